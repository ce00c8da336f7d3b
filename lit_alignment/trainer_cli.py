"""LightningCLI in subclass mode: fit, validate, test and predict from YAML or JSON."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import isclass
from pathlib import Path
from pydoc import locate
from typing import Any, Literal, TypeVar

import torch
from jsonargparse import ArgumentError, Namespace, _typehints, namespace_to_dict
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lit_alignment.callbacks.interrupt import Interrupt, slurm_job
from lit_alignment.callbacks.monitors import Monitors
from lit_alignment.callbacks.predictions import PredictionWriter
from lit_alignment.callbacks.progress import ModelSize, progress
from lit_alignment.callbacks.report import RunReport
from lit_alignment.callbacks.run_folder import (
    MaskedConfig,
    RunFolder,
    check_run_folder,
    leave_no_folder,
    note_figures,
)
from lit_alignment.callbacks.summary import EndSummary
from lit_alignment.callbacks.upload import Upload, fetch_checkpoint
from lit_alignment.checkpoints.io import AtomicCheckpointIO
from lit_alignment.checkpoints.newest import newest_checkpoint
from lit_alignment.checkpoints.resuming import (
    REQUEUED,
    CheckpointConnector,
    find_checkpoint,
    say_earlier_run,
    write_into_run_of,
)
from lit_alignment.config_errors import Checker, explain, find_misfit, find_unusable
from lit_alignment.config_files import placed, read_layers
from lit_alignment.config_help import class_help, command_help
from lit_alignment.config_items import split_items, with_items
from lit_alignment.data.base import AlignmentDataModule
from lit_alignment.errors import ConfigError, constructing
from lit_alignment.files import naming
from lit_alignment.modules.base import AlignmentModule
from lit_alignment.paths import cache_dir
from lit_alignment.planning.run import asked_of, out_of_memory
from lit_alignment.quiet import quiet_libraries
from lit_alignment.secrets import MASK, masks_in

Engine = Literal["transformers", "vllm"]
COMMANDS: dict[str, tuple[str, ...]] = {  # and which settings each has besides
    "fit": ("ckpt_path", "weights_only"),
    "validate": ("ckpt_path", "weights_only", "verbose"),
    "test": ("ckpt_path", "weights_only", "verbose"),
    "predict": ("ckpt_path", "weights_only", "return_predictions"),
}
FULL_NAMES: dict[str, Any] = {"allow_abbrev": False}
# A Trainer that touches no device and no logger.
NO_DEVICE: dict[str, Any] = {"logger": False, "accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
NO_DEVICE |= {"plugins": None, "profiler": None, "precision": None}

CLI = TypeVar("CLI", bound="AlignmentCLI")


class AlignmentCLI(LightningCLI):
    """Passes the module's tokenizer to the data module, and saves checkpoints whole or not at all."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the engine of predict, and link what module and data must agree on."""
        parser.add_argument(
            "--engine", type=Engine, default="transformers", help="what computes predictions (predict only)"
        )
        parser.add_argument(
            "--vllm", type=dict[str, Any], default={}, help="arguments of vLLM's engine, by the names of its EngineArgs"
        )
        parser.link_arguments("model", "data.init_args.tokenizer", compute_fn=_tokenizer, apply_on="instantiate")
        # Passed over where the data module has no such argument.
        parser.link_arguments("model", "data.init_args.labels", compute_fn=_labels, apply_on="instantiate")
        parser.link_arguments("model", "data.init_args.problem", compute_fn=_problem, apply_on="instantiate")
        parser.link_arguments("model", "data.init_args.media", compute_fn=_media, apply_on="instantiate")

    @property
    def uses_vllm(self) -> bool:
        """Whether vLLM computes what is run."""
        return self.subcommand == "predict" and self._get(self.config, "engine") == "vllm"

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and say so where the parser itself stumbles over a part of the wrong form.

        Raises:
            ConfigError: If it does.
        """
        try:
            super().parse_arguments(parser, args)
        except (AttributeError, TypeError, KeyError, IndexError) as error:
            raise ConfigError(
                f"the configuration cannot be read ({type(error).__name__}: {error}): a part of it has the wrong form, "
                "or a class_path is missing. Compare it with what --print_config writes."
            ) from error

    def _parse_ckpt_path(self) -> None:
        """Nothing: a checkpoint changes no setting, whatever `hyper_parameters` it holds."""

    def before_instantiate_classes(self) -> None:
        """Refuse nulls that the parser lets through, and leave the devices to vLLM, where that computes."""
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        if masks := list(masks_in(namespace_to_dict(config))):
            raise ConfigError(
                f"{masks[0]}: {MASK} stands for a secret, which a run does not write down. Give it again, or leave it "
                "out where an environment variable holds it."
            )
        for part, kind, usual in (
            ("model", AlignmentModule, "SFTModule"),
            ("data", AlignmentDataModule, "SFTDataModule"),
        ):
            if locate(str(config[part].class_path)) is kind:  # what the parser takes without one
                raise ConfigError(f"{part}.class_path is missing. Give one, such as lit_alignment.{usual}.")
            if (problem := find_misfit(config[part], kind, part)) is not None:
                raise ConfigError(problem)
        if (problem := find_misfit(config.trainer, Trainer, "trainer") or find_unusable(config)) is not None:
            raise ConfigError(problem)
        _check_pair(*(locate(config[part].class_path) for part in ("model", "data")))  # type: ignore[arg-type]
        if self.uses_vllm:
            _ask(self.config[self.subcommand].trainer, NO_DEVICE)

    def _set_seed(self) -> None:
        with constructing("seed_everything"):
            super()._set_seed()

    def instantiate_classes(self) -> None:
        """Make module, data module and trainer."""
        with constructing("the configuration"):
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer with atomic checkpoints, a Ctrl-C that is not lost, and in predict a writer."""
        # Our loaders shard batches across ranks themselves; Lightning's sampler would shuffle what must stay in order.
        kwargs["use_distributed_sampler"] = False
        trainer = super().instantiate_trainer(**kwargs)
        check_run_folder(trainer)
        trainer._checkpoint_connector = CheckpointConnector(trainer)
        if type(trainer.strategy.checkpoint_io).__module__.startswith("lightning.") and not self._has_plugin():
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if self.subcommand == "predict" and not any(isinstance(c, PredictionWriter) for c in callbacks):
            callbacks.append(PredictionWriter())
        self.run_folder = RunFolder()
        callbacks.insert(0, Monitors())  # before those that would stop the run at their first look
        callbacks += [RunReport(), Interrupt(), self.run_folder, EndSummary()]
        return trainer

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        if config.get("enable_progress_bar") is not False and not any(isinstance(each, ProgressBar) for each in given):
            callbacks = [*callbacks, progress()]
        if config.get("enable_model_summary") is not False and not any(
            isinstance(each, ModelSummary) for each in given
        ):
            callbacks = [*callbacks, ModelSize()]
        return super()._instantiate_trainer(config, callbacks)

    def _fetch_checkpoint(self, subcommand: str) -> None:
        """Find the newest checkpoint, or fetch one that is given by its URL; the saved configuration keeps the word."""
        given, resumes = self._get(self.config_init, "ckpt_path"), subcommand == "fit"
        word = given
        if isinstance(word, str) and "://" in word:
            callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
            uploads = [c for c in callbacks if isinstance(c, Upload)]
            options = next((u.storage_options for u in uploads if u.url.split(":")[0] == word.split(":")[0]), None)
            word = str(fetch_checkpoint(word, cache_dir(), options))
        job = slurm_job()
        if resumes and job is not None and (left := newest_checkpoint(self.trainer, f"{REQUEUED}{job}")) is not None:
            word = str(newest_checkpoint(self.trainer, only=left.parent) or left)  # this job has run before
        found = find_checkpoint(word, self.trainer, resumes)
        if found != given:
            self.config_init[subcommand]["ckpt_path"] = found
        if found is not None and resumes:
            write_into_run_of(found, self.trainer)
        if given is None and found is None and resumes:
            say_earlier_run(self.trainer)

    def _has_plugin(self) -> bool:
        plugins = self._get(self.config_init, "trainer.plugins") or []
        return any(isinstance(plugin, CheckpointIO) for plugin in (plugins if isinstance(plugins, list) else [plugins]))

    def _run_subcommand(self, subcommand: str) -> None:
        self._fetch_checkpoint(subcommand)
        if subcommand == "predict":
            self._write_beside_predictions()
        elif subcommand != "fit":
            leave_no_folder(self.trainer, self.datamodule)
        try:
            with self.run_folder.taken(self.trainer), naming(self._folder()):  # loggers name no file
                self._run(subcommand)
        except torch.OutOfMemoryError as error:
            if subcommand != "fit":
                raise
            asked = asked_of(self.trainer, self._get(self.config, "trainer.strategy"))
            raise ConfigError(out_of_memory(self.model, self.datamodule, asked, str(error))) from error

    def _folder(self) -> Path:
        return Path(self.trainer.log_dir or self.trainer.default_root_dir)

    def _write_beside_predictions(self) -> None:
        """Give predict no folder of a run: it logs nothing, and its report on the data stands where the answers do."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        writer = next(each for each in callbacks if isinstance(each, PredictionWriter))
        writer.write_for(self._get(self.config_init, "ckpt_path"))
        self.trainer.loggers = []
        self.trainer._default_root_dir = str(writer.output_dir)  # type: ignore[attr-defined]

    def _run(self, subcommand: str) -> None:
        if self.uses_vllm:
            from lit_alignment.vllm.predict import predict

            checkpoint = self._get(self.config_init, "ckpt_path")
            predict(self.model, self.datamodule, self.trainer, self._get(self.config_init, "vllm"), checkpoint)
        elif subcommand == "predict":
            # Answers go to a file as they come; keeping them all in memory as well serves nobody.
            self.trainer.predict(
                self.model,
                datamodule=self.datamodule,
                return_predictions=False,
                ckpt_path=self._get(self.config_init, "ckpt_path"),
            )
        else:
            super()._run_subcommand(subcommand)
            if subcommand != "fit":
                note_figures(subcommand, self.trainer, self.datamodule, self._get(self.config_init, "ckpt_path"))


def _ask(trainer: Namespace, settings: dict[str, Any]) -> None:
    """Ask a Trainer for other settings than the configuration does."""
    for name, value in settings.items():
        trainer[name] = value


def _check_pair(model: type[AlignmentModule], data: type[AlignmentDataModule]) -> None:
    """Refuse a module with another method's data module, whose batches it cannot read."""
    ours = isclass(model) and isclass(data) and data.__module__.startswith("lit_alignment.")
    if ours and not issubclass(data, model.data_classes):
        usual = " or ".join(f"lit_alignment.{kind.__name__}" for kind in model.data_classes)
        raise ConfigError(f"data.class_path is {data.__name__}, and {model.__name__} reads other data. Use {usual}.")


def _tokenizer(model: AlignmentModule) -> Any:
    return model.tokenizer


def _labels(model: AlignmentModule) -> list[str] | None:
    labels: list[str] | None = model.data_arguments().get("labels")
    return labels


def _problem(model: AlignmentModule) -> str | None:
    problem: str | None = model.data_arguments().get("problem")
    return problem


def _media(model: AlignmentModule) -> Any:
    return model.data_arguments().get("media")


def main(arguments: list[str]) -> None:
    """Run one of LightningCLI's commands, or print its help.

    Raises:
        ConfigError: If the configuration is wrong; the message names the key and the nearest valid one.
    """
    asks = next((number for number, word in enumerate(arguments) if word in ("-h", "--help")), None)
    if asks is None:
        build(arguments, run=True)
        return
    topic = next(iter(arguments[asks + 1 : asks + 2]), "")
    if topic == "trainer":
        build([arguments[0], "--help"], run=True)
    elif topic and not topic.startswith("-"):
        print(class_help(topic))
    else:
        checker = Checker(_hints())
        checker.check(read_layers(split_items(arguments)[0]))
        print(command_help(arguments[0], checker.classes))


def build(arguments: list[str], run: bool = False) -> AlignmentCLI:
    """Parse a command line, and run it or only build its objects.

    Args:
        arguments: With `run`, the command and its options; else the options alone.
        run: Whether to run the command.

    Raises:
        ConfigError: If the configuration is wrong.
    """
    return _built(AlignmentCLI, arguments, run)


def _built(kind: type[CLI], arguments: list[str], run: bool = False) -> CLI:
    quiet_libraries()
    arguments, of_items = split_items(arguments)
    layers = read_layers(arguments)
    checker = Checker(_hints())
    checker.check(layers)
    if of_items:
        arguments = with_items(arguments, of_items)
        layers = read_layers(arguments)
        checker.check(layers)
    try:
        with _lists_replace_lists():
            return kind(
                AlignmentModule,
                AlignmentDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                seed_everything_default=0,
                save_config_callback=MaskedConfig,
                save_config_kwargs={"overwrite": True},
                parser_kwargs={"exit_on_error": False, **FULL_NAMES, **dict.fromkeys(COMMANDS, FULL_NAMES)},
                args=arguments,
                run=run,
            )
    except ArgumentError as error:
        raise ConfigError(explain(str(error), layers, arguments[0] if run else "", checker.classes)) from error
    except MisconfigurationException as error:
        raise ConfigError(str(error).strip()) from error
    except ConfigError as error:
        error.args = (placed(str(error), layers),)
        raise
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # before the run takes the signal, as while it encodes
            raise KeyboardInterrupt from stop
        raise


def _hints() -> dict[str, Any]:
    """Type of each key of a configuration; those of a command other than the one that runs are taken, too."""
    parts = {"trainer": Trainer, "model": AlignmentModule, "data": AlignmentDataModule}
    plain = {"seed_everything": bool | int, "engine": Engine, "vllm": dict[str, Any]}
    return parts | plain | dict.fromkeys([name for names in COMMANDS.values() for name in names], Any)


@contextmanager
def _lists_replace_lists() -> Iterator[None]:
    """Have a list take the place of an earlier one; the parser fills its items up from those of one as long."""
    adapt: Any = _typehints.adapt_typehints

    def replacing(val: Any, *arguments: Any, append: bool = False, prev_val: Any = None, **options: Any) -> Any:
        earlier = None if isinstance(val, list) and not append else prev_val
        return adapt(val, *arguments, append=append, prev_val=earlier, **options)

    _typehints.adapt_typehints = replacing
    try:
        yield
    finally:
        _typehints.adapt_typehints = adapt


class ToolCLI(AlignmentCLI):
    """Builds module and data module as a command would, beside a Trainer that touches no device, logger or file."""

    asked: Namespace

    def before_instantiate_classes(self) -> None:
        """Keep what the configuration asks of the Trainer in `asked`, and ask for nothing."""
        super().before_instantiate_classes()
        self.asked = self.config.trainer.clone()
        _ask(self.config.trainer, {"callbacks": None, **NO_DEVICE})


def build_for_tool(arguments: list[str], kind: type[ToolCLI] = ToolCLI) -> ToolCLI:
    """The objects of a configuration for a tool that runs no Trainer.

    Args:
        arguments: Options as of `fit`.
        kind: What builds them.

    Raises:
        ConfigError: If the configuration is wrong.
    """
    if not any(argument.startswith("--config") or argument == "-c" for argument in arguments):
        raise ConfigError("no configuration: give --config FILE, as to fit.")
    return _built(kind, arguments)
