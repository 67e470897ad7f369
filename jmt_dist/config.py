"""Every knob of a recipe and of a site: typed, with its default and one line of meaning.

The defaults are the paper's (section 4.2) wherever the paper gives a number; recipes in
`launch/recipes/` hold differences only. Models are frozen, refuse unknown keys, and do not turn
strings into numbers.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

OFFICIAL = "official"
STAGES = ("visual", "audio", "features", "fusion", "evaluate")
FUSION_MODELS = ("jmt", "visual", "audio", "concat", "lstm", "vanilla", "selfattn_lstm", "jca", "lfan", "tcn", "gated")

# torchvision's weights for each backbone of this package, by stage
PRETRAINED = {"visual": {"r2plus1d": "kinetics400", "resnet50": "imagenet-resnet50"}, "audio": {"resnet18": "imagenet"}}

Stage = Literal["visual", "audio", "features", "fusion", "evaluate"]
FusionModel = Literal["jmt", "visual", "audio", "concat", "lstm", "vanilla", "selfattn_lstm", "jca", "lfan", "tcn", "gated"]
Modality = Literal["audio", "visual"]
Smoother = Literal["box", "hamming", "savgol"]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
# YAML reads `time: 90` and `account: 1234` as numbers; here they are words
Word = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
# not every shell replaces the ~ of out=~/shards: packing would make a folder of that name
Place = Annotated[Word, AfterValidator(os.path.expanduser)]
Phases = Annotated[list[Annotated[int, Field(ge=0, le=3)]], Field(min_length=1)]
Offsets = Annotated[list[Annotated[int, Field(ge=0, le=7)]], Field(min_length=1)]


class Options(BaseModel):
    """Base of all option groups: frozen, unknown keys refused, no silent conversion of values."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class FoldOptions(Options):
    """How the five folds are made (DESIGN section 5)."""

    policy: Literal["train+validation", "train-only"] = Field(
        "train+validation",
        description="units the five folds divide: train+validation, or train-only (official validation joins every training set)",
    )
    seed: Count = Field(0, description="seed of the division into folds")


class DataOptions(Options):
    """Where samples come from."""

    shards: str = Field("shards-affwild2", description="folder written by shards/pack_shards.py")
    threads: Positive = Field(2, description="DALI CPU threads per rank")
    prefetch: Positive = Field(2, description="batches DALI prepares ahead")
    shuffle_buffer: Positive = Field(512, description="samples in DALI's shuffle buffer")
    hw_decoder_load: Annotated[float, Field(ge=0, le=1)] = Field(0.65, description="share of JPEGs for the hardware decoder (GPU)")
    mmap: bool = Field(True, description="map the tars into memory; false on network file systems where mapping is slow")


class EngineOptions(Options):
    """DeepSpeed engine (DESIGN section 10)."""

    precision: Literal["fp32", "autocast", "bf16", "fp16"] = Field(
        "autocast", description="autocast = torch autocast to bf16, parameters stay fp32"
    )
    zero: Annotated[int, Field(ge=0, le=3)] = Field(0, description="ZeRO stage; with SGD only 0 survives a change of world size")
    clip: Annotated[float, Field(ge=0)] = Field(1.0, description="gradient norm is clipped to this; 0 = off")
    compile: bool = Field(False, description="torch.compile the model")
    channels_last: bool = Field(
        False, description="weights of 3-D convolutions in channels-last order, as the loader's frames are; needs zero=0"
    )


class OptimizerOptions(Options):
    """Optimiser of one stage."""

    name: Literal["sgd", "adam", "adamw"] = Field("sgd", description="optimiser")
    lr: Annotated[float, Field(gt=0)] = Field(1e-3, description="learning rate after warm-up")
    momentum: Share = Field(0.9, description="momentum (sgd)")
    nesterov: bool = Field(False, description="Nesterov momentum (sgd)")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="weight decay")


class ScheduleOptions(Options):
    """Learning rate over the steps of a stage."""

    name: Literal["constant", "cosine", "linear"] = Field("constant", description="shape after warm-up; cosine and linear end at 0")
    warmup_steps: Count = Field(0, description="steps over which the rate rises linearly from 0")


class TrainOptions(Options):
    """What every trained stage has."""

    optimizer: OptimizerOptions = Field(OptimizerOptions(), description="optimiser")
    schedule: ScheduleOptions = Field(ScheduleOptions(), description="learning-rate schedule")
    batch: Positive = Field(8, description="subsequences per optimiser step, over all ranks and accumulation steps")
    accumulation: Positive = Field(1, description="micro-batches per optimiser step and rank")
    accumulated_loss: Literal["batch", "micro_batch"] = Field(
        "batch",
        description="CCC of the whole accumulated batch (exact; one more forward pass), or the mean of the micro-batches' CCCs",
    )
    max_epochs: Positive = Field(50, description="passes over the training samples at most")
    max_steps: Count = Field(0, description="optimiser steps at most; 0 = no limit")
    patience: Positive = Field(5, description="epochs without a better validation score before the stage stops")
    phases: Phases = Field([0, 1, 2, 3], description="phases of the training segments used: [0] is a quarter of the samples")
    offsets_per_epoch: Annotated[int, Field(ge=1, le=8)] = Field(1, description="offsets of each sample used in one epoch")
    validation_offsets: Offsets = Field([0], description="offsets of the validation samples that give the early-stopping score")
    save_steps: Count = Field(200, description="steps between checkpoints within an epoch; 0 = at epoch ends only")
    keep: Positive = Field(2, description="newest checkpoints kept, besides the best weights")
    seed: Count = Field(0, description="added to the recipe's seed for this stage")


class VisualOptions(TrainOptions):
    """R(2+1)D on face clips (paper, section 4.2), or another backbone."""

    backbone: str = Field(
        "r2plus1d", description="r2plus1d, resnet50 (2-D, pooled over time), or one of your own, module:name (model/registry.py)"
    )
    depth: Literal[10, 18] = Field(18, description="layers of r2plus1d; 10 (one block per layer) has no pretrained weights")
    size: Annotated[int, Field(ge=16, le=224)] = Field(224, description="side of the square input in pixels")
    crop: Annotated[int, Field(ge=16, le=112)] = Field(104, description="side of the random crop, of 112 pixels, in training")
    flip: bool = Field(True, description="random horizontal flip in training")
    pooling: Literal["average", "max"] = Field("average", description="pooling of r2plus1d's last feature map, of resnet50 over time")
    dropout: Share = Field(0.8, description="dropout in the regression head")
    weights: str = Field("kinetics400", description="initial weights: kinetics400 (resnet50: imagenet-resnet50), none, or a file")
    batchnorm: Literal["frozen", "local", "sync"] = Field("local", description="BatchNorm under data parallelism (DESIGN section 8)")
    clips_per_subsequence: Annotated[int, Field(ge=1, le=8)] = Field(8, description="clips of a subsequence used in a training step")


class AudioOptions(TrainOptions):
    """ResNet-18 and GRU on spectrograms (paper, sections 3 and 4.2), or another backbone."""

    backbone: str = Field("resnet18", description="resnet18, or one of your own, module:name (model/registry.py)")
    optimizer: OptimizerOptions = Field(OptimizerOptions(name="adam", lr=1e-2), description="optimiser")
    batch: Positive = Field(64, description="subsequences per optimiser step, over all ranks and accumulation steps")
    gru: bool = Field(True, description="GRU over the 8 clips of a subsequence (resnet18)")
    dropout: Share = Field(0.0, description="dropout in the regression head")
    weights: str = Field("imagenet", description="initial weights: imagenet, none, or a file")
    batchnorm: Literal["frozen", "local", "sync"] = Field("local", description="BatchNorm under data parallelism (DESIGN section 8)")


class FeatureOptions(Options):
    """Features of the frozen backbones, stored for the fusion stage."""

    offsets: Offsets = Field([0, 1, 2, 3, 4, 5, 6, 7], description="offsets whose features are stored")
    batch: Positive = Field(8, description="samples per forward pass and rank")
    dtype: Literal["float16", "float32"] = Field(
        "float16", description="how features are stored; float32 takes twice the space and is exact in fp32"
    )


class JmtOptions(Options):
    """The Joint Multimodal Transformer (paper, section 3); the defaults are the paper as printed."""

    score: Literal["sigmoid", "softmax"] = Field("sigmoid", description="attention weights: sigmoid (equation 2) or softmax")
    rows: Literal["key", "query"] = Field("key", description="key: Y = f(K Q^T) V as printed; query: Y = f(Q K^T) V")
    scale: Literal["none", "sqrt"] = Field("none", description="none: scores as printed; sqrt: divided by the root of the head size")
    bias: Literal["none", "log_length"] = Field("none", description="log_length: minus the log of the sequence length is added to scores")
    cross: Literal["separate", "shared"] = Field("separate", description="six cross-attentions, or three shared by query modality")
    head: Literal["concat", "self_attention"] = Field(
        "concat", description="concat: 3072 -> 1024 -> 128 -> 1; self_attention: over the six outputs"
    )
    joint: bool = Field(True, description="use the joint stream J = FC([Fa; Fv])")
    normalise: bool = Field(False, description="L2-normalise input features")
    heads: Positive = Field(1, description="attention heads")
    layers: Positive = Field(1, description="layers per encoder")
    feedforward: Positive = Field(512, description="width of the encoder's feed-forward layer")
    dropout: Share = Field(0.0, description="dropout in encoders and head")
    positional: Literal["none", "learned", "sinusoidal"] = Field("none", description="positional encoding")


class FusionOptions(TrainOptions):
    """Fusion of frozen features (paper, sections 3 and 4.2)."""

    optimizer: OptimizerOptions = Field(OptimizerOptions(lr=5e-4), description="optimiser")
    batch: Positive = Field(2, description="subsequences per optimiser step, over all ranks and accumulation steps")
    max_epochs: Positive = Field(5, description="passes over the training samples at most")
    offsets_per_epoch: Annotated[int, Field(ge=1, le=8)] = Field(8, description="offsets of each sample used in one epoch")
    validation_offsets: Offsets = Field(
        [0, 1, 2, 3, 4, 5, 6, 7], description="offsets of the validation samples that give the early-stopping score"
    )
    model: FusionModel = Field("jmt", description="fusion model")
    jmt: JmtOptions = Field(JmtOptions(), description="knobs of fusion.model=jmt")
    seeds: Annotated[list[Count], Field(min_length=1)] = Field([0], description="one training per seed; scores are averaged")
    baselines: list[FusionModel] = Field([], description="models trained beside fusion.model, on the same features and seeds")
    baseline_folds: list[str] = Field([OFFICIAL], description="folds in which the baselines are trained")
    modality_dropout: Share = Field(
        0.0, description="share of training subsequences whose audio or visual features, one at random, are withheld (0)"
    )
    ranks: Count = Field(0, description="ranks that train the fusion; surplus ranks wait; 0 = all that the batch allows")


class FinetuningOptions(TrainOptions):
    """Training of backbones and fusion as one network, from the parts that the frozen stages trained (finetune=true)."""

    optimizer: OptimizerOptions = Field(OptimizerOptions(lr=1e-4), description="optimiser of all three parts")
    batch: Positive = Field(2, description="subsequences per optimiser step, over all ranks and accumulation steps")
    max_epochs: Positive = Field(5, description="passes over the training samples at most")
    batchnorm: Literal["frozen", "local", "sync"] = Field("frozen", description="BatchNorm of the backbones (DESIGN section 8)")


class EvaluateOptions(Options):
    """Dense prediction and scoring of a fold's validation units (DESIGN section 9)."""

    offsets: Offsets = Field([0, 1, 2, 3, 4, 5, 6, 7], description="offsets predicted; frames between are interpolated")
    smooth_valence: Positive = Field(1, description="smoothing window in frames for valence; 1 = none")
    smooth_arousal: Positive = Field(1, description="smoothing window in frames for arousal; 1 = none")
    smooth_valence_kind: Smoother = Field("box", description="kind of the window for valence: box, hamming or savgol")
    smooth_arousal_kind: Smoother = Field("box", description="kind of the window for arousal: box, hamming or savgol")
    test: bool = Field(False, description="also predict the dataset's test units, for the challenge file")
    withhold: list[Modality] = Field(["audio", "visual"], description="also score with these withheld, one at a time: what is lost")
    bootstrap: Count = Field(1000, description="bootstrap rounds over videos for the 95 % interval; 0 = none")


class Recipe(Options):
    """What to train: one complete system, for every fold."""

    name: str = Field("paper", description="name of the experiment in MLflow and in tables", min_length=1)
    seed: Count = Field(0, description="seed of initialisation, order, augmentation and dropout")
    label: Literal["end", "middle"] = Field(
        "end", description="frame of a clip that its label and its prediction belong to: the last, or the fifth of its eight"
    )
    stages: Annotated[list[Stage], Field(min_length=1)] = Field(
        ["visual", "audio", "features", "fusion", "evaluate"], description="stages to run, in their fixed order"
    )
    profile: bool = Field(False, description="write a Chrome trace of five steps into the folder of each stage that is trained")
    data: DataOptions = Field(DataOptions(), description="where samples come from")
    folds: FoldOptions = Field(FoldOptions(), description="how folds are made")
    engine: EngineOptions = Field(EngineOptions(), description="DeepSpeed engine")
    visual: VisualOptions = Field(VisualOptions(), description="visual stage")
    audio: AudioOptions = Field(AudioOptions(), description="audio stage")
    features: FeatureOptions = Field(FeatureOptions(), description="features stage")
    fusion: FusionOptions = Field(FusionOptions(), description="fusion stage")
    finetune: bool = Field(False, description="after the fusion of each seed, train the whole pipeline end to end; evaluated beside it")
    finetuning: FinetuningOptions = Field(FinetuningOptions(), description="end-to-end training where finetune=true")
    evaluate: EvaluateOptions = Field(EvaluateOptions(), description="evaluate stage")

    @model_validator(mode="after")
    def _offsets_are_stored(self) -> Recipe:
        stored = set(self.features.offsets)
        for key, wanted in (
            ("fusion.validation_offsets", self.fusion.validation_offsets),
            ("evaluate.offsets", self.evaluate.offsets),
        ):
            missing = sorted(set(wanted) - stored)
            if missing:
                raise ValueError(f"{key} asks for offsets {missing} that features.offsets does not store")
        if self.fusion.offsets_per_epoch > len(stored):
            raise ValueError(
                f"fusion.offsets_per_epoch={self.fusion.offsets_per_epoch} is more than the {len(stored)} offsets of features.offsets"
            )
        if self.fusion.model in self.fusion.baselines:
            raise ValueError(f"fusion.baselines names fusion.model={self.fusion.model} itself")
        return self


class Site(Options):
    """Where to train: one machine or one SLURM partition."""

    name: str = Field("local", description="name of the site")
    executor: Literal["local", "slurm"] = Field("local", description="local: this machine; slurm: sbatch through submitit")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where the job finds a GPU")
    parallel: Positive = Field(2, description="fold jobs that run at the same time")
    nodes: Positive = Field(1, description="nodes per fold job")
    ranks_per_node: Positive = Field(1, description="processes per node: one per GPU, or CPU ranks")
    gpus_per_node: Count = Field(0, description="GPUs per node asked of SLURM; 0 = none")
    gres: bool = Field(False, description="ask for GPUs by --gres=gpu:N instead of --gpus-per-node=N")
    cpus_per_rank: Positive = Field(1, description="CPU cores per process; also torch's threads")
    memory_gb: Count = Field(0, description="memory per node in GB asked of SLURM; 0 = the partition's default")
    time: Word = Field("24:00:00", description="time limit of a fold job: minutes, HH:MM:SS or D-HH:MM:SS")
    tries: Positive = Field(3, description="starts of a fold job, at most, after timeouts, preemption and crashes")
    partition: Word = Field("", description="SLURM partition")
    account: Word = Field("", description="SLURM account")
    qos: Word = Field("", description="SLURM quality of service")
    constraint: Word = Field("", description="SLURM node constraint")
    exclude: Word = Field("", description="SLURM nodes to leave out")
    environment: list[str] = Field([], description="shell lines before the job starts, such as module load")
    extra: dict[str, Word] = Field({}, description="further sbatch options, name: value")
    staging: str = Field("", description="node-local folder to copy the shards to before training; empty = none")
    hang_seconds: Count = Field(1800, description="seconds without a finished batch after which a rank ends with a stack dump; 0 = never")
    signal_seconds: Positive = Field(120, description="seconds before the time limit at which SLURM warns the job")
    system_seconds: Count = Field(10, description="seconds between samples of CPU, memory, GPU and I/O; 0 = none")
    tracking_uri: str = Field("", description="MLflow tracking URI; empty: sqlite beside the run (local), spool only (slurm)")


class FixtureOptions(Options):
    """The synthetic Aff-Wild2 (DESIGN section 13)."""

    out: Place = Field(description="folder to write, new or made by this program")
    units: Annotated[int, Field(ge=3)] = Field(24, description="annotated units in train and validation together")
    test_units: Count = Field(2, description="units without labels")
    rows: Annotated[int, Field(ge=64)] = Field(256, description="label rows per unit")
    gotchas: Literal["none", "harmless", "all"] = Field(
        "harmless", description="irregularities of the real dataset: those that cost no unit, or all"
    )
    seed: Count = Field(0, description="seed of identities, walks and noise")
    workers: Positive = Field(2, description="processes")


class PackOptions(Options):
    """Packing into shards (DESIGN section 6)."""

    source: Place = Field(description="root folder of the dataset")
    out: Place = Field(description="folder for the shards")
    audio: Literal["wav", "flac"] = Field("wav", description="wav is faster to decode, flac 40 % smaller")
    samples_per_shard: Positive = Field(256, description="samples per tar")
    seed: Count = Field(0, description="seed of the global sample order")
    folds: FoldOptions = Field(FoldOptions(), description="fold indexes written beside the shards")
    workers: Positive = Field(2, description="processes, per job where site is given")
    site: Place = Field("", description="site file, as in slurm/sites/: pack by its jobs, site.parallel at a time; empty: here")
    wait: bool = Field(True, description="with a SLURM site: wait for the jobs and print the report")
    strict: bool = Field(False, description="stop at the first input error instead of leaving the unit out")
    dry: bool = Field(False, description="only report inventory, space and time")


class VerifyOptions(Options):
    """Verification of shards (DESIGN section 6)."""

    shards: Place = Field(description="folder written by pack_shards.py")
    against: Place = Field("", description="dataset root: also compare every strip with its source files")
    workers: Positive = Field(2, description="processes")


class ShowOptions(Options):
    """Looking at one sample of a shard folder."""

    shards: Place = Field(description="folder written by pack_shards.py")
    key: str = Field("", description="key of the sample, <unit>-<segment>-<phase>; empty: the first sample of the folder")
    offset: Annotated[int, Field(ge=0, le=7)] = Field(7, description="which subsequence is drawn: where in the strip it starts")
    out: Place = Field("", description="PNG to write; empty: <key>.png in the current folder")
