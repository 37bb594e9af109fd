"""graft compiles LLM decoding: capture a Hugging Face model, transform it, lower it, run it."""

from pkgutil import extend_path

# In a checkout the folder graft/ holds the face alone and the four stages stand beside it; the installed package
# holds them all. Extending the path lets `python -m graft` work from the checkout's root too.
__path__ = extend_path(__path__, __name__)

from graft.calibration import (
    DropCalibration,
    SkipCalibration,
    calibrate_drops,
    calibrate_layer_parallel,
    calibrate_skip_ffn,
    search_self_draft,
)
from graft.compiled import CompiledModel
from graft.compiler.drafting import Controller, Drafter, TreePolicy, Verifier
from graft.compiler.errors import (
    CaptureError,
    CheckError,
    CheckpointError,
    GenerationError,
    GraftError,
    LoweringError,
    PassError,
    PlanError,
    SaveError,
    StateError,
)
from graft.compiler.kv.codecs import Affine, Codec, Content, DensePages, InPlace, KeyChannels
from graft.compiler.kv.eviction import (
    H2O,
    TOVA,
    Cached,
    Eviction,
    KeyDifference,
    KeyNorm,
    RandomEviction,
    SnapKV,
    StreamingLLM,
)
from graft.compiler.kv.residual_codecs import Bitmap, Gear
from graft.compiler.kv.selection import DoubleSparsity, PageBounds, PageMeans, Selection
from graft.compiler.nodes import Value, new_node
from graft.compiler.passing import Pass, View, approximate, exact, lossless
from graft.compiler.pipeline import PassWarning
from graft.compiler.plan import Plan, Tree
from graft.compiling import compile
from graft.loading import load
from graft.passes.canonicalise import Canonicalise
from graft.passes.clover_heads import CloverHeads
from graft.passes.common_subexpression import CommonSubexpression
from graft.passes.compress_kv import CompressKV
from graft.passes.confidence_exit import ConfidenceExit
from graft.passes.dead_code import DeadCode
from graft.passes.drop_block import DropBlock
from graft.passes.eagle_heads import EagleHeads
from graft.passes.early_exit import EarlyExit
from graft.passes.hydra_heads import HydraHeads
from graft.passes.judge_head import JudgeHead
from graft.passes.kv_cache import KVCache
from graft.passes.layer_parallel import LayerParallel
from graft.passes.medusa_heads import MedusaHeads
from graft.passes.merge_linears import MergeLinears
from graft.passes.routed_ffn import RoutedFFN
from graft.passes.skip_decode import SkipDecode
from graft.passes.skip_ffn import SkipFFN
from graft.passes.zero_computation_experts import ZeroComputationExperts
from graft.runtime.controllers import Adaptive, FixedBudget
from graft.runtime.drafters.draft_model import DraftModel
from graft.runtime.drafters.early_exits import DEL, Kangaroo, LayerSkip
from graft.runtime.drafters.heads import Heads
from graft.runtime.drafters.lookup import Lookup
from graft.runtime.drafters.recycle import Recycle
from graft.runtime.drafters.self_draft import SelfDraft
from graft.runtime.drafters.trie import Trie
from graft.runtime.rejection import KSeq, RecursiveRejection
from graft.runtime.tree_policies import BestFirst, Chain, ChainUntil, Fixed, StochasticBeam
from graft.runtime.verifiers import GreedyWalk, Leviathan, LossyJudge, LossyTypical, SampleAndMatch
from graft.training import RouterOptions, TrainOptions, export_heads, train_heads, train_routers

__all__ = [
    "DEL",
    "H2O",
    "TOVA",
    "Adaptive",
    "Affine",
    "BestFirst",
    "Bitmap",
    "Cached",
    "Canonicalise",
    "CaptureError",
    "Chain",
    "ChainUntil",
    "CheckError",
    "CheckpointError",
    "CloverHeads",
    "Codec",
    "CommonSubexpression",
    "CompiledModel",
    "CompressKV",
    "ConfidenceExit",
    "Content",
    "Controller",
    "DeadCode",
    "DensePages",
    "DoubleSparsity",
    "DraftModel",
    "Drafter",
    "DropBlock",
    "DropCalibration",
    "EagleHeads",
    "EarlyExit",
    "Eviction",
    "Fixed",
    "FixedBudget",
    "Gear",
    "GenerationError",
    "GraftError",
    "GreedyWalk",
    "Heads",
    "HydraHeads",
    "InPlace",
    "JudgeHead",
    "KSeq",
    "KVCache",
    "Kangaroo",
    "KeyChannels",
    "KeyDifference",
    "KeyNorm",
    "LayerParallel",
    "LayerSkip",
    "Leviathan",
    "Lookup",
    "LossyJudge",
    "LossyTypical",
    "LoweringError",
    "MedusaHeads",
    "MergeLinears",
    "PageBounds",
    "PageMeans",
    "Pass",
    "PassError",
    "PassWarning",
    "Plan",
    "PlanError",
    "RandomEviction",
    "RecursiveRejection",
    "Recycle",
    "RoutedFFN",
    "RouterOptions",
    "SampleAndMatch",
    "SaveError",
    "Selection",
    "SelfDraft",
    "SkipCalibration",
    "SkipDecode",
    "SkipFFN",
    "SnapKV",
    "StateError",
    "StochasticBeam",
    "StreamingLLM",
    "TrainOptions",
    "Tree",
    "TreePolicy",
    "Trie",
    "Value",
    "Verifier",
    "View",
    "ZeroComputationExperts",
    "approximate",
    "calibrate_drops",
    "calibrate_layer_parallel",
    "calibrate_skip_ffn",
    "compile",
    "exact",
    "export_heads",
    "load",
    "lossless",
    "new_node",
    "search_self_draft",
    "train_heads",
    "train_routers",
]
