"""What `lit-alignment inspect --rollout` shows: responses before training, with their rewards and advantages."""

import math
import tempfile
from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table
from rich.text import Text

from lit_alignment.data.rollout import Answer, Group
from lit_alignment.modules.base import alignment_module
from lit_alignment.terminal import Terminal, printable
from lit_alignment.trainer_cli import ToolCLI


class TrialRollout(Callback):
    """Samples one rollout where the training would begin, and ends it.

    Args:
        number: Prompts to sample responses to.

    Attributes:
        groups: The responses.
    """

    def __init__(self, number: int) -> None:
        """Nothing is sampled yet."""
        self.number = number
        self.groups: list[Group] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample."""
        self.groups = alignment_module(pl_module).trial_rollout(self.number)
        trainer.should_stop = True


def sample_rollout(cli: ToolCLI, number: int) -> list[Group]:
    """Responses to the first training prompts by the configured sampler, scored and weighed, with the weights of now.

    A Trainer on one device of the configuration's kind loads the model and takes no step.

    Args:
        cli: Module and data module.
        number: How many prompts.

    Raises:
        ConfigError: If the method samples no responses in training.
    """
    cli.model.trial_rollout(0)
    trial = TrialRollout(number)
    with tempfile.TemporaryDirectory() as folder:  # for what a run writes beside its results
        trainer = Trainer(
            accelerator=cli.asked["accelerator"],
            devices=1,
            precision=cli.asked["precision"],
            max_epochs=1,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
            callbacks=[trial],
        )
        trainer.fit(cli.model, cli.datamodule)
    return trial.groups


def print_rollout(console: Terminal, groups: Sequence[Group], names: Sequence[str]) -> None:
    """One table a prompt, and a line over all responses.

    Args:
        console: Where to.
        groups: The responses.
        names: Of the prompts' records.
    """
    for number, (group, name) in enumerate(zip(groups, names, strict=True), start=1):
        console.rule(f"rollout {number}: {name}", align="left")
        console.print(response_table(group))
    console.rule("rollout", align="left")
    console.print(rollout_line(groups), soft_wrap=True)


def response_table(group: Group) -> Table:
    """One line a response: the reward, what each of several functions gives, advantage, tokens, whether it was cut."""
    names = list({name: None for answer in group.answers for name in answer.scores})
    table = Table(show_lines=True)
    for heading in (*(name.removeprefix("reward_") for name in names), "advantage", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("response", overflow="fold", min_width=20)
    for answer in group.answers:
        scores = [f"{answer.scores[name]:.3g}" if name in answer.scores else "" for name in names]
        length = f"{len(answer.token_ids)}{' cut' if answer.truncated else ''}"
        table.add_row(*scores, f"{answer.advantage:+.3f}", length, Text(printable(answer.text)))
    return table


def rollout_line(groups: Sequence[Group]) -> str:
    """Mean reward, and how many groups and responses teach nothing."""
    answers = [answer for group in groups for answer in group.answers]
    scored = [answer.reward for answer in answers if not math.isnan(answer.reward)]
    level = sum(not any(answer.advantage for answer in group.answers) for group in groups)
    parts = [f"{len(answers)} responses to {len(groups)} prompts"]
    parts.append(f"mean reward {sum(scored) / len(scored):.3g}" if scored else "no rewards")
    parts.append(f"prompts whose responses all have the same reward: {level}")
    return ", ".join([*parts, *_counts(answers, len(scored))])


def _counts(answers: Sequence[Answer], scored: int) -> list[str]:
    """Of responses that are cut, and that have no reward."""
    cut, unscored = sum(answer.truncated for answer in answers), len(answers) - scored
    return [f"{number} {what}" for number, what in ((cut, "cut at the limit"), (unscored, "not scored")) if number]
