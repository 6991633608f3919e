"""The settings of a run, by section; `Config` describes a run completely and is stored with it."""

from typing import Literal

from pydantic import Field, model_validator

from prime_jax.config.hybrid import HybridSection, check_hybrid
from prime_jax.frozen import Frozen
from prime_jax.losses.jasper import JasperLossConfig
from prime_jax.models import ModelConfig
from prime_jax.models.jasper import SteeredConfig
from prime_jax.models.prime import PredictorConfig

Variant = Literal["centroid", "keyword", "residual", "predicted"]


# What reads embeddings of passages made before training, and so does not go with a Y-encoder that is trained:
# they are those of an encoder that is gone, and new ones would have to be made at each step.
_ENCODED_ONCE: tuple[tuple[str, object], ...] = (
    ("micro_batch_size", 0),
    ("target", "frozen"),
    ("positives", "one"),
    ("negatives", "batch"),
    ("num_negatives", 0),
    ("context_negatives", False),
    ("mined_negatives", 0),
    ("average_weights", 0.0),
)


class TrainingConfig(Frozen):
    """How a predictor is trained (spec section 8, plan section 4)."""

    learning_rate: float = Field(default=1e-4, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(default=0.01, ge=0, description="decoupled weight decay, on matrices only")
    batch_size: int = Field(default=64, ge=1, description="examples per step, over all devices")
    micro_batch_size: int = Field(
        default=0, ge=0, description="examples whose activations are held at a time; 0: the whole batch"
    )
    num_epochs: int = Field(default=10, ge=1, description="passes over the training split")
    warmup_steps: int = Field(default=1000, ge=0, description="linear warm-up; at most a tenth of the run")
    gradient_checkpointing: bool = Field(default=True, description="recompute activations to save memory")
    remat_policy: Literal["blocks", "dots"] = Field(
        default="blocks", description="what gradient_checkpointing recomputes: all, or all but products"
    )
    mixed_precision: bool = Field(default=True, description="matrix products in bfloat16")
    gradient_clip_val: float = Field(
        default=1.0, ge=0, description="largest gradient norm; 0 turns clipping off"
    )
    accumulate_grad_batches: int = Field(default=1, ge=1, description="batches per optimizer update")
    temperature: float = Field(default=0.07, gt=0, description="InfoNCE temperature")
    temperature_schedule: Literal["fixed", "learned", "annealed"] = Field(
        default="fixed", description="whether the temperature is trained (0.01 to 0.5) or moves to the end"
    )
    temperature_end: float = Field(default=0.02, gt=0, description="last temperature when annealed")
    projection_dim: int = Field(
        default=0, ge=0, description="ProjNCE: dimension of a learned projection to compare in; 0: none"
    )
    projection_weight: float = Field(
        default=1.0, gt=0, description="weight of the loss in the projection beside the plain one"
    )
    target: Literal["frozen", "slow", "ema"] = Field(
        default="frozen", description="targets as encoded, or through a head that is trained slowly"
    )
    y_encoder_lr_multiplier: float = Field(
        default=0.05, ge=0, le=1, description="learning rate of target head or Y-encoder, as a share"
    )
    ema_start: float = Field(default=0.996, ge=0, lt=1, description="first decay of target: ema")
    ema_end: float = Field(default=0.999, ge=0, lt=1, description="last decay of target: ema")
    x_encoder: Literal["frozen", "trained"] = Field(
        default="frozen", description="encoder of turns and queries: as it is, or trained along"
    )
    y_encoder: Literal["frozen", "slow", "ema"] = Field(
        default="frozen", description="encoder of passages: as it is, trained slowly, or the average of X"
    )
    x_encoder_lr_multiplier: float = Field(
        default=0.1, ge=0, le=1, description="learning rate of a trained X-encoder, as a share"
    )
    unfreeze_epochs: float = Field(
        default=0.0, ge=0, description="epochs in which encoder layers start to move, the top one first"
    )
    layers_lr_multiplier: float = Field(
        default=1.0, ge=0, le=1, description="learning rate of the transformer layers, as a share; 0: frozen"
    )
    layer_decay: float = Field(
        default=1.0, gt=0, le=1, description="share of its learning rate that a layer leaves the one below"
    )
    lora_rank: int = Field(
        default=0, ge=0, description="train low-rank updates of frozen layers, of this rank; 0: the layers"
    )
    positives: Literal["one", "all"] = Field(
        default="one", description="a row per right answer, or a row per example with all of them"
    )
    negatives: Literal["batch", "corpus"] = Field(
        default="batch", description="what a prediction is told from: the batch's targets, or all passages"
    )
    corpus_chunk: int = Field(default=8192, ge=1, description="passages at a time for negatives: corpus")
    num_negatives: int = Field(default=0, ge=0, description="explicit negatives per example, from the data")
    context_negatives: bool = Field(default=False, description="the turns' own passages are negatives too")
    mined_negatives: int = Field(default=0, ge=0, le=10, description="hard negatives found by searching")
    mine_every_epochs: int = Field(default=1, ge=1, description="epochs between two searches for negatives")
    mining_margin: float = Field(
        default=0.05, ge=0, lt=1, description="how far a negative stays below the positive, relatively"
    )
    rotation: float = Field(
        default=0.0, ge=0, le=1, description="share of batches turned at random; helps on unseen topics"
    )
    average_weights: float = Field(
        default=0.0, ge=0, lt=1, description="decay of a moving average of weights that predicts; 0: none"
    )
    start: str = Field(
        default="encoder",
        description="text: start as the encoder, as the `general` predictor of the package, or with the "
        "adapter of a file",
    )
    blend_with_start: bool = Field(
        default=False,
        description="text: predict with the mix of start and trained weights that is best on dev",
    )
    seed: int = Field(default=0, ge=0, description="seed of weights, data order and dropout")
    eval_every_epochs: int = Field(default=1, ge=1, description="epochs between validations and checkpoints")
    select_by: Literal["MRR@10", "unseen MRR@10"] = Field(
        default="MRR@10", description="dev figure of the best checkpoint; unseen: answers not in train"
    )
    save_every_steps: int = Field(default=0, ge=0, description="steps between more checkpoints; 0: none")
    params_dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="dtype of the saved inference parameters"
    )

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "TrainingConfig":
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}"
            )
        if self.y_encoder == "ema" and self.x_encoder == "frozen":
            raise ValueError("y_encoder 'ema' averages the X-encoder, so x_encoder must be 'trained'")
        if self.y_encoder != "frozen":
            for name, plain in _ENCODED_ONCE:
                if getattr(self, name) != plain:
                    raise ValueError(
                        f"{name} {getattr(self, name)!r} needs embeddings of passages that stay; with "
                        f"y_encoder {self.y_encoder!r} it must be {plain!r}"
                    )
        if self.lora_rank and (self.layers_lr_multiplier, self.layer_decay) != (1.0, 1.0):
            raise ValueError(
                "lora_rank freezes the layers and trains updates at the full learning rate; leave "
                "layers_lr_multiplier and layer_decay at 1"
            )
        if self.negatives == "corpus":
            for name, off in (("target", "frozen"), ("projection_dim", 0)):
                if getattr(self, name) != off:
                    raise ValueError(
                        f"negatives 'corpus' compares with the passages as they are encoded; {name} moves "
                        "what is compared: use negatives 'batch'"
                    )
        return self


class DataConfig(Frozen):
    """Which texts are trained on, and which encoder embeds them."""

    path: str | None = Field(default=None, description="folder with corpus.jsonl, train.jsonl, dev.jsonl")
    store: str | None = Field(
        default=None, description="embedding store; default: embeddings/ in the data folder"
    )
    encoder: str = Field(default="minilm", description="minilm, a model folder, or module:name of an Encoder")
    encoder_precision: Literal["float32", "tf32", "bfloat16"] = Field(
        default="float32", description="of the encoder's products; a store is of one encoder in one precision"
    )
    query_prefix: str = Field(default="", description="put before queries and turns when encoding")
    passage_prefix: str = Field(default="", description="put before passages when encoding")
    context_from: Literal["data", "search"] = Field(
        default="data", description="turns come from the data, or from a first dense search"
    )
    first_pass_k: int = Field(default=10, ge=1, description="passages per query for context_from: search")


class SteeringConfig(Frozen):
    """Which steering vectors JASPER is trained and judged with (JASPER plan; docs/jasper.md)."""

    path: str | None = Field(
        default=None, description="what `prime-jax steering` wrote; default: steering/ in the data folder"
    )
    variants: tuple[Variant, ...] = Field(
        default=("centroid", "keyword", "residual"), min_length=1, description="that training draws from"
    )
    zero_start: float = Field(default=0.5, ge=0, le=1, description="share of rows without steering at first")
    zero_end: float = Field(default=0.1, ge=0, le=1, description="that share in the end")
    zero_epochs: float = Field(default=100.0, gt=0, description="epochs from the first to the last share")
    hard_negatives: bool = Field(default=True, description="use the hard negatives of the steering folder")
    judge_with: Literal["zero", "centroid", "keyword", "residual", "predicted"] = Field(
        default="predicted", description="steering on dev; centroid leaks the answer's cluster"
    )

    @model_validator(mode="after")
    def _less_and_less_unsteered(self) -> "SteeringConfig":
        if self.zero_end > self.zero_start:
            raise ValueError(f"zero_end {self.zero_end} is above zero_start {self.zero_start}")
        return self


class MeshConfig(Frozen):
    """How devices are arranged; -1 means all that are left."""

    data: int = Field(default=-1, ge=-1, description="groups of devices that share the batch")
    fsdp: int = Field(default=1, ge=1, description="devices that share weights and optimizer state")


class MonitorConfig(Frozen):
    """Where a run's figures go besides history.jsonl, history.csv and curves.png."""

    tensorboard: bool = Field(default=False, description="also to tensorboard/ in the run folder")
    wandb: str | None = Field(default=None, description="also to this Weights & Biases project")
    log_every: int = Field(default=20, ge=1, description="steps between two rows of the history")


# What a steered model takes as it is: its targets do not move, its one turn is the steering vector.
_STEERED_ONLY = (
    ("train", "target", "frozen"),
    ("train", "positives", "one"),
    ("train", "rotation", 0.0),
    ("train", "layers_lr_multiplier", 1.0),
    ("train", "x_encoder", "frozen"),
    ("train", "y_encoder", "frozen"),
    ("train", "layer_decay", 1.0),
    ("train", "lora_rank", 0),
    ("train", "context_negatives", False),
    ("data", "context_from", "data"),
)


# A text predictor reads words and is the encoder of turns and queries itself.
_TEXT_ONLY = (
    ("train", "rotation", 0.0),
    ("train", "x_encoder", "frozen"),
    ("train", "y_encoder", "frozen"),
    ("hybrid", "enabled", False),
)


class Config(Frozen):
    """Everything that defines a run."""

    model: ModelConfig = Field(default_factory=PredictorConfig)
    train: TrainingConfig = Field(default_factory=TrainingConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    mesh: MeshConfig = Field(default_factory=MeshConfig)
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)
    steering: SteeringConfig = Field(default_factory=SteeringConfig)
    jasper: JasperLossConfig = Field(default_factory=JasperLossConfig)
    hybrid: HybridSection = Field(default_factory=HybridSection)

    @property
    def steered(self) -> bool:
        """Whether the model takes a steering vector in place of turns."""
        return isinstance(self.model, SteeredConfig)

    @model_validator(mode="after")
    def _sections_fit_together(self) -> "Config":
        needed = _STEERED_ONLY if self.steered else _TEXT_ONLY if self.model.reads_text else ()
        for section, name, only in needed:
            given = getattr(getattr(self, section), name)
            if given != only:
                raise ValueError(
                    f"{section}.{name} is {given!r}, but a {self.model.kind} model needs {only!r}"
                )
        if self.train.blend_with_start and not self.model.reads_text:
            raise ValueError(
                f"train.blend_with_start mixes with the encoder that a model starts as; a {self.model.kind} "
                "model starts at random"
            )
        if self.train.start != "encoder" and (
            not self.model.reads_text or self.model.checkpoint_path is not None
        ):
            raise ValueError(
                f"train.start {self.train.start!r} is an adapter, which goes with a text predictor that "
                "starts as its encoder (model.kind text, no model.checkpoint_path)"
            )
        if self.model.takes_one_text and self.data.context_from == "search":
            raise ValueError(
                "model.conversation_input is query and turns as one text, but data.context_from 'search' has "
                "passages as turns; set one of them back"
            )
        trained = self.train.x_encoder == "trained" or self.train.y_encoder != "frozen"
        if trained and self.model.takes_one_text:
            raise ValueError(
                "model.conversation_input is an embedding by an encoder that stays; with an encoder that is "
                "trained take model.kind 'text', which reads the words"
            )
        if trained and self.data.context_from == "search":
            raise ValueError(
                "data.context_from 'search' has passages as turns, which an encoder that moves would have to "
                "find and encode anew all the time; model.kind 'text' reads them as words"
            )
        if self.train.rotation and self.model.input_dim != self.model.output_dim:
            raise ValueError(
                f"train.rotation turns queries and predictions alike, so model.input_dim "
                f"{self.model.input_dim} must equal model.output_dim {self.model.output_dim}"
            )
        check_hybrid(self)
        return self
