"""The configurations that `init` writes: one head for all methods, and what each adds."""

from dataclasses import dataclass, field
from string import Template

from lit_alignment.tools.init.records import Records
from lit_alignment.tools.init.start import Start, word
from lit_alignment.tools.parsers import TINY

HEAD = """\
# $title, written by `lit-alignment init $method`. From this folder:
#   lit-alignment inspect --config $out    # what the model will see, and which records are dropped
#   lit-alignment fit --config $out        # train; the same with --ckpt_path newest goes on with a run
# The command line wins over this file: --trainer.max_epochs 1 --model.optimizer.learning_rate 1e-4
seed_everything: 0
trainer:
  max_epochs: $epochs
  gradient_clip_val: 1.0
  log_every_n_steps: 5
  # val_check_interval: 0.25  # validate four times an epoch; as it is, at its end
  # precision: bf16-mixed     # on a GPU
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {save_dir: runs, name: $method}
  callbacks:
    # Every N steps, the newest alone.
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {filename: "every-{step}", every_n_train_steps: 50}
    # The best by validation.
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {filename: "best-{step}", $monitor}
    # Ends the training when three validations in a row were no better.
    - class_path: lightning.pytorch.callbacks.EarlyStopping
      init_args: {$monitor, patience: 3}
    # The same records at each validation, side by side: report.html.
    - class_path: lit_alignment.$report
    # The best checkpoint as a folder that from_pretrained and servers load: checkpoints/export.
    - class_path: lit_alignment.Export
model:
  class_path: lit_alignment.${kind}Module
  init_args:
    backbone: $backbone
"""
LORA = """\
    peft:  # LoRA; without it all weights train
      class_path: peft.LoraConfig
      init_args: {r: 16, lora_alpha: 32, target_modules: all-linear, task_type: $task}
"""
ADAPTER = """\
    # The adapter of an earlier run, trained further over its base, which is the backbone above.
    adapter: {path: $adapter, trainable: true}
"""
RATE = "    optimizer: {learning_rate: $rate}\n"
GREEDY = "    generation:  # what predict writes: one file for each name\n      greedy: {max_new_tokens: 64}\n"
DATA = """\
data:
  class_path: lit_alignment.${kind}DataModule
  init_args:
$form    $sources
    encoding: {max_length: $length}  # tokens
"""
PACKED = "    tokens_per_batch: $tokens  # of a packed row\n"
PROMPTS = "    batch_size: 4  # prompts\n"


@dataclass(frozen=True)
class MethodTemplate:
    """What a method's configuration adds.

    Args:
        title: What it does.
        kind: The classes' names, without their ends.
        samples: Folder of the recipes with records to try it on.
        model: Settings of the module.
        monitor: What is best, as settings of a callback.
        batches: Settings of batches.
        length: Most tokens of a record.
        task: Of LoRA.
        report: The callback that shows records.
        image: Whether pictures enter.
        models: Further models of the hub.
        before: Commands between `inspect` and `fit`.
    """

    title: str
    kind: str
    samples: str
    model: str = GREEDY
    monitor: str = "monitor: val/loss"
    batches: str = PACKED
    length: int = 1024
    task: str = "CAUSAL_LM"
    report: str = "CherryPicks"
    image: bool = False
    models: tuple[str, ...] = ()
    before: tuple[str, ...] = ()


@dataclass(frozen=True)
class Values:
    """What stands in one configuration.

    Args:
        method: One of METHODS.
        start: What it starts from; its path may be TINY.
        out: The file that is written.
        sources: What is trained, validates and is predicted, as YAML.
        passages: Passages, a file of records or a folder of text, as a YAML value.
        records: What the records hold.
    """

    method: str
    start: Start
    out: str
    sources: str
    passages: str = ""
    records: Records = field(default_factory=Records)


SCORES = "    labels: $labels\n    problem: $problem\n"
PREFERENCES = """\
    losses:  # several add up, each with a weight
      - {name: $loss, beta: 0.1}
"""
REWARDS = """\
    rewards:  # weighted and summed; PythonReward takes a function of your own
      - class_path: lit_alignment.rollout.ExactMatchReward  # the record's last response, or its label
        init_args: {weight: 1.0}
      - class_path: lit_alignment.rollout.LengthReward
        init_args: {minimum: 1, maximum: 40, tolerance: 40, unit: words, weight: 0.2}
    rollout: {num_responses: 8, max_new_tokens: 64}  # of each prompt
"""
TEACHER = """\
    teacher: $teacher  # has the same tokens
    on_policy_share: 0.5  # of the prompts, answered by the student itself
    rollout: {max_new_tokens: 64}
"""
RETRIEVAL = """\
    retriever: $retriever
    index:
      path: runs/index  # made by `lit-alignment index build --config $out`
      passages: [{path: $passages}]  # records {title?, text}, or a folder of text, cut at headings and paragraphs
    objective: rag_sequence
    num_passages: 4
"""
IMAGES = """\
    image:
      encoders: [$encoder]
      projector: {kind: mlp}
    projector_learning_rate: 1.0e-3
"""

ENCODER = "openai/clip-vit-base-patch32"
RETRIEVER = "sentence-transformers/all-MiniLM-L6-v2"
TEACHER_MODEL = "HuggingFaceTB/SmolLM2-360M-Instruct"
METHODS = {
    "sft": MethodTemplate("Supervised fine-tuning on chat records", "SFT", "sft/support"),
    "classification": MethodTemplate(
        "A classifier of texts and conversations",
        "Classification",
        "classification/support",
        model=SCORES,
        length=512,
        task="SEQ_CLS",
        report="ScoredPicks",
    ),
    "reward": MethodTemplate(
        "A reward model of compared responses",
        "Reward",
        "reward/support",
        model="",
        task="SEQ_CLS",
        report="ScoredPicks",
    ),
    "preference": MethodTemplate(
        "Preference optimisation (DPO; KTO of responses judged alone)",
        "Preference",
        "reward/support",
        model=PREFERENCES + GREEDY,
    ),
    "policy": MethodTemplate(
        "Policy optimisation (GRPO) by rewards of sampled responses",
        "Policy",
        "sft/support",
        model=REWARDS + GREEDY,
        monitor="monitor: val/reward, mode: max",
        batches=PROMPTS,
        length=512,
    ),
    "distillation": MethodTemplate(
        "Distillation of a teacher into a smaller student",
        "Distillation",
        "sft/support",
        model=TEACHER + GREEDY,
        monitor="monitor: val/kl",
        batches=PROMPTS,
        length=512,
        models=(TEACHER_MODEL,),
    ),
    "rag": MethodTemplate(
        "Retrieval-augmented generation: retriever and generator trained together",
        "RAG",
        "rag/support",
        model=RETRIEVAL + GREEDY,
        batches=PROMPTS,
        length=512,
        models=(RETRIEVER,),
        before=("index build",),
    ),
    "vlm": MethodTemplate(
        "A language model that learns to see", "VLM", "vlm/shapes", model=IMAGES + GREEDY, image=True
    ),
}


def configuration(values: Values) -> str:
    """The text of a configuration.

    Args:
        values: What stands in it.
    """
    kind, tiny, records = METHODS[values.method], values.start.path == TINY, values.records
    small = "{path: sample_model/tiny, weights: random}"  # the folder holds a configuration and a tokenizer, no weights
    added = "" if tiny else LORA if values.start.adapter is None else ADAPTER
    tower = "{path: sample_model/tiny, weights: random, towers: separate}"
    encoder = "{path: sample_model/tiny_vision, weights: random, layer: -1}"
    text = HEAD + added + kind.model + RATE + DATA + kind.batches
    return Template(text).substitute(
        vars(kind) | vars(values),
        epochs=4 if tiny else 3,
        backbone=small if tiny else values.start.backbone(),
        adapter=word(values.start.adapter or ""),
        teacher=small if tiny else f"{{path: {TEACHER_MODEL}}}",
        retriever=tower if tiny else f"{{path: {RETRIEVER}, towers: separate, temperature: 0.05}}",
        encoder=encoder if tiny else f"{{path: {ENCODER}}}",
        rate="5.0e-3" if tiny else "3.0e-5" if values.method in ("preference", "policy") else "5.0e-4",
        tokens=2 * kind.length,
        labels=f"[{', '.join(map(_label, records.labels))}]",
        problem=records.problem,
        loss="kto" if records.alone else "sigmoid",
        form="    kind: outcomes  # each response is judged alone\n" if records.alone else "",
    )


def _label(text: str) -> str:
    """A label as a text in YAML, whatever it looks like."""
    return "'" + text.replace("'", "''") + "'"
