"""The configuration: one frozen dataclass a group, every key with its meaning and unit.

Names follow Megatron-LM's arguments where it has one. The YAML files in configs/
only select values; what a key means, and which values it may take, is said here.
"""

from dataclasses import dataclass, field
from typing import Any


def key(default: Any, text: str, unit: str = "", choices: tuple[str, ...] = (), within: str = "") -> Any:
    """A documented configuration key: its default, meaning, unit and allowed values.

    `within` is an interval such as "[1, inf)" or "(0, 1)"; [ ] include the end, ( ) exclude it.
    """
    metadata = {"help": text, "unit": unit, "choices": choices, "within": within}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RotaryScaling:
    type: str = key(
        "none",
        "how rotary frequencies are rescaled for long context",
        choices=("none", "linear", "llama3", "yarn"),
    )
    factor: float = key(1.0, "context extension factor", within="[1, inf)")
    low_freq_factor: float = key(
        1.0, "llama3: wavelengths above original/low_freq_factor are divided by factor", within="(0, inf)"
    )
    high_freq_factor: float = key(
        4.0, "llama3: wavelengths below original/high_freq_factor are kept", within="(0, inf)"
    )
    original_max_position_embeddings: int = key(
        8192, "llama3, yarn: context length before the extension", "tokens", within="[1, inf)"
    )
    beta_fast: float = key(
        32.0, "yarn: frequencies that turn more often in the original context are kept", within="(0, inf)"
    )
    beta_slow: float = key(
        1.0, "yarn: frequencies that turn less often are divided by factor", within="(0, inf)"
    )
    attention_factor: float = key(
        0.0, "yarn: factor of cosines and sines; 0: 0.1 ln(factor) + 1", within="[0, inf)"
    )


@dataclass(frozen=True)
class ModelConfig:
    num_layers: int = key(4, "decoder layers", within="[1, inf)")
    hidden_size: int = key(128, "residual width h", within="[1, inf)")
    ffn_hidden_size: int = key(384, "width of the gated MLP", within="[1, inf)")
    num_attention_heads: int = key(4, "query heads H", within="[1, inf)")
    num_query_groups: int = key(2, "key/value heads K; must divide num_attention_heads", within="[1, inf)")
    kv_channels: int = key(32, "width d of one head", within="[1, inf)")
    vocab_size: int = key(
        257, "rows of the embedding; at least the tokenizer's size", "tokens", within="[1, inf)"
    )
    rotary_base: float = key(10000.0, "base of the rotary frequencies", within="(0, inf)")
    rotary_scaling: RotaryScaling = field(
        default_factory=RotaryScaling, metadata={"help": "rescaling of the rotary frequencies"}
    )
    norm_epsilon: float = key(1e-5, "added to the mean square in RMSNorm", within="(0, inf)")
    add_qkv_bias: bool = key(False, "biases on the query, key and value projections (Qwen2)")
    qk_layernorm: bool = key(False, "RMSNorm on queries and keys (Qwen3, OLMo2)")
    qk_layernorm_width: str = key(
        "head",
        "qk_layernorm: over each head (Qwen3), or over all heads together (OLMo2)",
        choices=("head", "all"),
    )
    norm_position: str = key(
        "before",
        "RMSNorm of what attention and the MLP read (Llama), or of what they give (OLMo2)",
        choices=("before", "after"),
    )
    no_rope_freq: int = key(
        0,
        "every so many layers one, the last of them, has no rotary embedding (SmolLM3); 0: all have it",
        "layers",
        within="[0, inf)",
    )
    max_position_embeddings: int = key(
        0,
        "context length that an exported model says it has; 0: trainer.seq_length",
        "tokens",
        within="[0, inf)",
    )
    untie_embeddings_and_output_weights: bool = key(False, "give the output head a matrix of its own")
    init_method_std: float = key(0.02, "standard deviation of the initial weights", within="(0, inf)")


@dataclass(frozen=True)
class DataConfig:
    path: list[str] = key(
        ["outputs/data/python_stdlib/byte"],
        "sources: one prefix of a .bin/.idx pair or folder of such pairs; or weight and source in turn; or "
        "several sources, weighted by their samples",
    )
    valid_path: list[str] = key([], "sources of validation samples, likewise; []: documents held out of path")
    test_path: list[str] = key([], "sources of test samples, likewise; []: documents held out of path")
    tokenizer: str = key(
        "byte", "'byte', a tokenizer's file or folder, a Hugging Face name, or tiktoken:NAME"
    )
    valid_fraction: float = key(
        0.05,
        "share of each source's documents held out for validation, if no valid_path is given",
        within="[0, 1)",
    )
    test_fraction: float = key(0.0, "share held out likewise for a test after the last step", within="[0, 1)")
    packing: str = key(
        "concat",
        "how documents become samples: concat: one stream, cut every seq_length; greedy, best_fit: documents "
        "packed apart from each other; pad: one a sample",
        choices=("concat", "greedy", "best_fit", "pad"),
    )
    reset_attention_mask: bool = key(
        False, "concat: attention, positions and loss stay within documents, as with every other packing"
    )
    long_documents: str = key(
        "split",
        "greedy, best_fit, pad: what becomes of a document that is longer than a sample",
        choices=("split", "truncate", "drop"),
    )
    loss_on: str = key(
        "auto",
        "tokens that are trained: all, the assistant's, or those of its last turn; auto: the assistant's "
        "where the data says who speaks, all otherwise",
        choices=("auto", "all", "assistant", "last"),
    )
    num_workers: int = key(
        1, "processes a rank that read samples ahead; 0: the rank itself", "processes", within="[0, inf)"
    )
    prefetch_factor: int = key(4, "micro-batches that each of them reads ahead", "batches", within="[1, inf)")
    cache: str = key(
        "", "folder of sample indices; empty: beside the data, or a temporary one where that is read-only"
    )


# The axes of the mesh, outermost first.
AXES = ("dp_replicate", "dp_shard", "cp", "tsp", "tp")


@dataclass(frozen=True)
class ParallelConfig:
    tsp: int = key(
        1, "ranks D of the folded tensor and sequence axis; -1: what is left", "ranks", within="[-1, inf)"
    )
    tsp_layout: str = key("hidden", "which slice of a weight a tsp rank holds", choices=("hidden", "owner"))
    overlap: str = key(
        "auto",
        "how layers' weights and gradients travel over tsp: by collectives, or inside the products' kernels "
        "(fused: layout hidden, ranks on one host); auto: fused on GPUs, where a probe at the start passes",
        choices=("auto", "collective", "fused"),
    )
    attention_buckets: int = key(
        0, "buckets an attention layer is streamed in; 0 chooses", "buckets", within="[0, inf)"
    )
    mlp_buckets: int = key(0, "buckets an MLP is streamed in; 0 chooses", "buckets", within="[0, inf)")
    head_buckets: int = key(
        0, "buckets the vocabulary head is streamed in; 0 chooses", "buckets", within="[0, inf)"
    )
    cp: int = key(
        1,
        "context-parallel ranks: tokens sharded, weights not; -1: what is left",
        "ranks",
        within="[-1, inf)",
    )
    kv_exchange: str = key(
        "allgather",
        "how attention crosses the ranks of cp and tsp; hierarchical: a ring over cp, all-gathers over tsp",
        choices=("allgather", "ring", "ulysses", "hierarchical"),
    )
    tp: int = key(
        1,
        "tensor-parallel ranks, with sequence-parallel norms; -1: what is left",
        "ranks",
        within="[-1, inf)",
    )
    dp_shard: int = key(-1, "FSDP ranks; -1: what the other axes leave", "ranks", within="[-1, inf)")
    fsdp_over_cp: bool = key(False, "FSDP shards weights over cp too, instead of replicating them there")
    dp_replicate: int = key(
        1, "replicas of the sharded model (HSDP); -1: what is left", "ranks", within="[-1, inf)"
    )
    pp: int = key(1, "pipeline stages; only 1 in this version", "ranks", within="[1, inf)")


@dataclass(frozen=True)
class KernelsConfig:
    """What computes each operation; auto: Triton on a GPU, torch on a CPU."""

    attention: str = key(
        "auto",
        "attention; flash_attn, aiter: those libraries, where they are installed",
        choices=("auto", "triton", "torch", "flash_attn", "aiter"),
    )
    norm: str = key(
        "auto",
        "RMSNorm; apex: its fused norm, where it is installed",
        choices=("auto", "triton", "torch", "apex"),
    )
    rotary: str = key("auto", "rotary embedding", choices=("auto", "triton", "torch"))
    swiglu: str = key("auto", "SwiGLU", choices=("auto", "triton", "torch"))
    loss: str = key(
        "auto",
        "vocabulary head's cross-entropy; triton writes no logits",
        choices=("auto", "triton", "torch"),
    )


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = key("adamw", "which optimizer", choices=("adamw", "apex_fused_adam"))
    lr: float = key(3e-4, "peak learning rate", within="(0, inf)")
    weight_decay: float = key(
        0.1, "decoupled weight decay of matrices (norm gains and biases have none)", within="[0, inf)"
    )
    adam_beta1: float = key(0.9, "decay of the first moment", within="[0, 1)")
    adam_beta2: float = key(0.95, "decay of the second moment", within="[0, 1)")
    adam_eps: float = key(1e-8, "added to the root of the second moment", within="(0, inf)")
    clip_grad: float = key(1.0, "largest global gradient norm; 0 does not clip", within="[0, inf)")


@dataclass(frozen=True)
class SchedulerConfig:
    lr_decay_style: str = key(
        "cosine", "shape of the decay after warm-up", choices=("cosine", "linear", "WSD", "constant")
    )
    min_lr: float = key(3e-5, "learning rate at the end of the decay", within="[0, inf)")
    lr_warmup_iters: int = key(0, "iterations of linear warm-up from 0", "iterations", within="[0, inf)")
    lr_decay_iters: int = key(
        0, "iteration at which the decay ends; 0: train_iters", "iterations", within="[0, inf)"
    )
    lr_wsd_decay_iters: int = key(0, "WSD: length of the final decay", "iterations", within="[0, inf)")


@dataclass(frozen=True)
class TrainerConfig:
    seq_length: int = key(256, "tokens T of one sample", "tokens", within="[1, inf)")
    micro_batch_size: int = key(
        4, "samples a data-parallel rank computes at once", "samples", within="[1, inf)"
    )
    global_batch_size: int = key(
        8, "samples of one optimizer step over all ranks", "samples", within="[1, inf)"
    )
    train_iters: int = key(100, "optimizer steps", "iterations", within="[1, inf)")
    eval_interval: int = key(
        50, "evaluate every so many iterations; 0: only at the end", "iterations", within="[0, inf)"
    )
    eval_iters: int = key(4, "global batches of one evaluation", "batches", within="[1, inf)")
    dtype: str = key("fp32", "compute type; master weights are always fp32", choices=("fp32", "bf16"))
    recompute_granularity: str = key(
        "none", "what the backward computes again", choices=("none", "selective", "full")
    )
    seed: int = key(1234, "of initial weights and of the order of samples", within="[0, inf)")
    exit_duration_in_mins: float = key(
        0.0,
        "save and exit, to be started again, so long after the start; 0: never",
        "minutes",
        within="[0, inf)",
    )
    hang_timeout_s: float = key(
        900.0,
        "a rank that gets no further for so long ends the run, with every rank's stack; below "
        "launch.timeout_s, or 0: never",
        "seconds",
        within="[0, inf)",
    )
    max_bad_steps: int = key(
        3,
        "steps in a row that are skipped because loss or gradients are not finite, before on_bad_steps",
        "iterations",
        within="[1, inf)",
    )
    on_bad_steps: str = key(
        "stop",
        "what then: stop; or rollback: go on from the last good checkpoint, without their samples",
        choices=("stop", "rollback"),
    )
    max_rollbacks: int = key(3, "rollbacks of one run, before it stops", within="[0, inf)")
    rerun_bad_steps: bool = key(
        True, "compute a bad step again, to tell bad hardware (bits differ) from bad data (they do not)"
    )
    spike_deviations: float = key(
        10.0,
        "a loss is a spike so many robust standard deviations above the recent ones' median; 0: none is",
        within="[0, inf)",
    )
    spike_window: int = key(
        128, "recent losses that a new one is held against", "iterations", within="[16, inf)"
    )
    on_spike: str = key(
        "warn",
        "warn; skip: make no update; rollback: as on_bad_steps",
        choices=("warn", "skip", "rollback"),
    )


@dataclass(frozen=True)
class CheckpointConfig:
    save_interval: int = key(
        100, "save every so many iterations; 0: only at the end", "iterations", within="[0, inf)"
    )
    async_save: bool = key(True, "write in the background: training waits for the copy to host memory alone")
    keep_last: int = key(
        0,
        "newest checkpoints that are kept; older ones are removed once a newer one is whole; 0: all are kept",
        "checkpoints",
        within="[0, inf)",
    )
    keep_every: int = key(
        0,
        "keep_last never removes those of every so many iterations, nor the best one; 0: no others",
        "iterations",
        within="[0, inf)",
    )
    verify: str = key(
        "checksums",
        "what is held against a checkpoint's manifest when it is loaded",
        choices=("checksums", "sizes"),
    )
    strict: bool = key(
        False, "refuse to start if the newest checkpoint is damaged, instead of taking the newest good one"
    )


# The matrices of a layer, by their names in a Hugging Face checkpoint.
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class FinetuneConfig:
    """`megatsp sft`: what is tuned, and what becomes of it."""

    hf: str = key(
        "", "the Hugging Face checkpoint to tune: its folder, or its name on the hub; empty: first weights"
    )
    verify: bool = key(
        True, "hold imported and exported models' logits against transformers'; false: trust them"
    )
    lora_rank: int = key(
        0,
        "rank r of the low-rank adapters (LoRA), which alone are tuned; 0: all weights are",
        within="[0, inf)",
    )
    lora_alpha: float = key(16.0, "adapters are scaled by lora_alpha / lora_rank", within="(0, inf)")
    lora_targets: list[str] = key(list(MATRICES), f"matrices with adapters: of {', '.join(MATRICES)}")
    early_stopping: int = key(
        0,
        "stop after so many evaluations without a lower validation loss; 0: never",
        "evaluations",
        within="[0, inf)",
    )
    export: str = key(
        "best",
        "what is given back to Hugging Face at the end: the checkpoint of the lowest validation loss (the "
        "last one, if there is no validation), the last one, or none",
        choices=("best", "last", "none"),
    )
    export_dtype: str = key(
        "auto", "type of exported weights; auto: as imported", choices=("auto", "fp32", "bf16", "fp16")
    )
    lora_merge: bool = key(False, "export the tuned weights too, adapters added, not adapters alone")


@dataclass(frozen=True)
class LoggingConfig:
    log_interval: int = key(10, "log every so many iterations", "iterations", within="[1, inf)")
    wandb: str = key(
        "auto",
        "Weights & Biases; auto: as WANDB_MODE says, or online where an API key is set, or offline",
        choices=("auto", "online", "offline", "disabled"),
    )
    slow_rank_factor: float = key(
        1.5,
        "name the host of a rank that computes so many times as long as the median one, in two log intervals "
        "in a row; 0: none",
        within="[0, inf)",
    )
    profile_step_start: int = key(
        0, "first iteration that torch's profiler records; 0: none", "iterations", within="[0, inf)"
    )
    profile_step_end: int = key(0, "the last one", "iterations", within="[0, inf)")
    profile_ranks: list[int] = key([0], "ranks that it records")
    memory_history: bool = key(
        False, "record every allocation of a GPU, for the snapshot that is written when memory runs out"
    )
    wandb_project: str = key("megatsp", "W&B project, where WANDB_PROJECT does not say")
    wandb_entity: str = key("", "W&B user or team, where WANDB_ENTITY does not say; empty: the key's default")
    wandb_artifacts: bool = key(False, "give W&B the exported model at the end of `megatsp sft`")
    alerts: bool = key(
        True, "W&B alerts: a hang, losses that are not finite, spikes, rollbacks, the end; see events.jsonl"
    )
    sample_interval: int = key(
        0,
        "let the model continue sample_prompts every so many iterations; 0: never",
        "iterations",
        within="[0, inf)",
    )
    sample_prompts: list[str] = key(["The "], "texts to continue")
    sample_tokens: int = key(64, "tokens of each continuation", "tokens", within="[1, inf)")


@dataclass(frozen=True)
class SlurmConfig:
    partition: str = key("", "partition of the job; empty: the cluster's default")
    account: str = key("", "account that pays; empty: the user's default")
    qos: str = key("", "quality of service; empty: the default")
    constraint: str = key("", "features that a node must have; empty: none")
    reservation: str = key("", "reservation to run in; empty: none")
    exclude: str = key("", "nodes to keep off, in Slurm's notation; empty: none")
    time: str = key("", "time limit, such as 4:00:00 or 2-12:00:00; empty: the partition's")
    tasks: str = key(
        "node",
        "what srun starts: node: one task a node, torch's elastic agent, which starts a rank a GPU; gpu: the "
        "ranks themselves",
        choices=("node", "gpu"),
    )
    gpu_request: str = key(
        "gpus-per-node",
        "the option that asks for GPUs; none only where Slurm does not manage GPUs, or options asks for "
        "them; with device=cpu none is asked for",
        choices=("gpus-per-node", "gres", "none"),
    )
    cpus_per_rank: int = key(0, "cores a rank; 0: the cluster's default", "cores", within="[0, inf)")
    exclusive: bool = key(True, "share nodes with nobody")
    signal_s: int = key(
        300, "ask ranks to save and end so long before the time limit", "seconds", within="[10, 65535]"
    )
    max_requeues: int = key(20, "times that the job may go back into the queue", within="[0, inf)")
    port: int = key(
        0, "first of 30 ports at which ranks meet; 0: one made of the job's number", within="[0, 65000]"
    )
    setup: list[str] = key([], "shell commands at the job's begin, such as ['module load rocm']")
    container: str = key(
        "", "what runs a command inside a container, such as `apptainer exec --rocm IMAGE.sif`; empty: none"
    )
    options: list[str] = key([], "further options of sbatch, such as ['--mail-type=END']")


@dataclass(frozen=True)
class LaunchConfig:
    nproc: int = key(
        1,
        "ranks of a node, one a GPU; those that `megatsp train` starts here when no launcher did",
        "processes",
        within="[1, inf)",
    )
    nodes: int = key(1, "nodes of a job of `megatsp launch`", "nodes", within="[1, inf)")
    spare_nodes: int = key(
        0,
        "nodes beside them, which take the place of those that fail the preflight",
        "nodes",
        within="[0, inf)",
    )
    profile: str = key(
        "none",
        "environment variables and expected speeds of a kind of cluster: a file of launch/profiles by its "
        "name, one of your own by its path, or none",
    )
    preflight: str = key(
        "full",
        "what a job examines before its first step: full; quick: no GPU work; none",
        choices=("full", "quick", "none"),
    )
    device: str = key(
        "auto", "where to compute; auto: a GPU if there is one", choices=("auto", "cpu", "cuda")
    )
    timeout_s: int = key(1800, "longest wait for another rank in a collective", "seconds", within="[1, inf)")
    max_restarts: int = key(
        3,
        "times in a row that ranks are started again after one died, without a new checkpoint",
        within="[0, inf)",
    )
    restart_backoff_s: float = key(
        5.0, "wait before the first of them; it doubles each time, up to 300", "seconds", within="[0, inf)"
    )
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass(frozen=True)
class Config:
    name: str = key("run", "name of the run and of its folder")
    output_dir: str = key("outputs", "parent folder of all runs")
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
