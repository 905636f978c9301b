"""The graph of the study. `make reproduce SCALE=...` runs it; `snakemake --profile .slurm --config scale=paper ...` runs it on a cluster.

What is stale is decided by content, not by dates alone. A notebook runs again when
  - its own file changed (prose included: the executed copy is published),
  - the code of a module that it imports changed, directly or through another module (a hash without comments and docstrings),
  - a parameter changed, or a file it reads was made anew.
So a new word in one report runs that report and the page that shows it, and nothing else.
"""
import json, os, sys
from pathlib import Path
from focusdiff.core import check_scale
from focusdiff.doctor import visible_gpus
from focusdiff.pipeline import code_version
from focusdiff.realign_methods import coarse_stage, first_picture, study_plan
from focusdiff.soft_methods import EDITORS, KINDS, TRAININGS, kinds_at_hand, parts_of, soft_plan

# ---------------------------------------------------------------------------------------------------------------- what is run

METHODS = ["sft", "grpo", "pair_grpo"]          # each against "base", the checkpoint as it is
ATTRIBUTION = ["pair_no_joint", "pair_joint_mean_only", "pair_joint_std_only", "pair_no_injection", "pair_positives_only",
               "pair_negatives_only", "pair_constant_p", "pair_official_logps", "pair_reconstructed_reward"]
SCENES = ["paircomp-scenes", "geneval-scenes", "t2i-compbench-scenes", "dpg-scenes", "counterfactual-scenes"]
REAL = ["paircomp", "geneval", "t2i_compbench", "dpg"]

# scale: which variants are trained, with which training seeds; the first benchmark is for every variant, the others for "base" and the methods
RUNS = {
    "tiny":  dict(methods=METHODS, seeds=[0], attribution=ATTRIBUTION, attribution_seeds=[0], benchmarks=SCENES),
    "small": dict(methods=METHODS, seeds=[0, 1, 2, 3, 4], attribution=ATTRIBUTION, attribution_seeds=[0, 1, 2, 3, 4], benchmarks=SCENES),
    "paper": dict(methods=METHODS, seeds=[0], attribution=ATTRIBUTION, attribution_seeds=[0], benchmarks=REAL),
    "smoke": dict(methods=METHODS, seeds=[0], attribution=["pair_no_joint"], attribution_seeds=[0], benchmarks=SCENES),
}

# RealignDiff: the three sets of prompts; the seed of the coarse stages is the paper's (section 4.1)
TWINS = ["coco-scenes", "abc6k-scenes", "cc500-scenes"]
ALIGNED = {"tiny": TWINS, "small": TWINS, "paper": ["coco", "abc6k", "cc500"], "smoke": TWINS[:1]}
ALIGN_SEED = 42

# SoftREPA: the trainings of each backbone (those without a checkpoint are left out), the seeds of the main one, sets of prompts and edits
ALL = {k: [t for t in TRAININGS if k in TRAININGS[t].kinds] for k in KINDS}
ABLATIONS = {"sd": ["soft", "contrastive_only", "low_rank"], "sdxl": ["soft", "contrastive_only"], "sd3": ["soft", "low_rank", "layers_1", "length_8"]}
EDITS = ["pie-scenes", "div2k-scenes", "cat2dog-scenes"]
SOFT = {
    "tiny":  dict(trainings=ABLATIONS, edit_sets=EDITS[:1]),
    "small": dict(trainings=ALL, seeds=(42, 43, 44, 45, 46), edit_sets=EDITS),
    "paper": dict(trainings=ALL, sets=("coco", "geneval"), edit_sets=["pie-bench"]),
    "smoke": dict(trainings={"sd": ["soft"]}, sets=("coco-scenes",), edit_sets=EDITS[:1], editors=("pnp_direct",)),
}

SECONDS = {"66_train_soft": 100, "67_soft_generate": 90, "72_soft_edit": 60, "64_train_coarse": 120, "65_paint": 90, "61_build_pairs": 60, "62_train_policy": 150, "63_evaluate": 60, "report": 15}   # guesses for the first run at scale tiny

# At scale paper: GPUs of a rule's jobs (those in sight, a power of two that divides a step; .slurm/config.yaml says its own), the editing set that pairs are built from, who judges it, and in how many shards
GPUS = {"train_policy": min(8, 1 << len(visible_gpus()).bit_length() >> 1) or 1, "evaluate": 1, "train_coarse": 1, "paint": 1, "train_soft": 1, "soft_generate": 1, "soft_edit": 1}
EDIT_SET, FILTER_JUDGE = (config.get(k, os.environ.get(f"FOCUSDIFF_{k.upper()}", "")) for k in ("edits", "filter_judge"))
PAIR_SHARDS = int(config.get("pair_shards", 8))

# What a report reads, if it is not everything of its paper: "pairs", "training", "align", "coarse", "soft", or the name of a benchmark. A report on what a scale does not have is left out there.
# RealignDiff's reports (r01 and on) read "align", the pictures and scores on its three sets; SoftREPA's (s01 and on) read "soft", its trainings, pictures and edits.
REPORT_READS = {
    "99_index": ["reports"],
    "83_fig3_pairs": ["pairs"],
    "86_fig6_counterfactual": ["counterfactual-scenes"],
    "94_judge_calibration": ["paircomp-scenes"],
    "88_fig8_funnel": ["pairs"],
    "r13_learning_curve": ["coarse"],
}
def report_needs(stem, default): return REPORT_READS.get(stem, {"r": ["align"], "s": ["soft"]}.get(stem[0], default))

# ---------------------------------------------------------------------------------------------------------------- names

SCALE = check_scale(config.get("scale", "tiny"))
RUN, OUT, PYTHON = RUNS[SCALE], f"out/{SCALE}", sys.executable
SPEED = {"smoke": 0.3, "tiny": 1, "small": 10, "paper": 100}[SCALE]
SHELF, MANIFEST = Path("data/zoo"), Path("data/zoo/manifest.json")
AT_HAND = KINDS if SCALE == "paper" else kinds_at_hand(json.loads(MANIFEST.read_text())) if MANIFEST.exists() else []

def zoo(*names):
    "Weights that a notebook loads, so that one new checkpoint makes nothing stale but what reads it; none at scale paper."
    return [str(f) for name in names for f in sorted((SHELF / name).rglob("*.safetensors"))] if SCALE != "paper" else []

POLICY = zoo("tiny-janus", "tiny-llava", "tiny-paligemma")                               # FocusDiff
DIFFUSION = zoo("tiny-sd", "tiny-blip2", "tiny-blip2-itm", "tiny-clip", "tiny-negclip")  # RealignDiff
def soft_zoo(kind): return zoo(f"tiny-{kind}", "tiny-clip")                              # SoftREPA
SOFTLY = soft_plan(**{**SOFT[SCALE], "trainings": {k: names for k, names in SOFT[SCALE]["trainings"].items() if k in AT_HAND}})
AVAILABLE = {"pairs", "training", "reports", *RUN["benchmarks"], *(["align", "coarse"] if ALIGNED[SCALE] else []), *(["soft"] if SOFTLY.train else [])}
REPORTS = sorted(p.stem for p in Path("nbs/report").glob("*.ipynb") if AVAILABLE.issuperset(report_needs(p.stem, [])))

TRAINED = [(v, s) for v in RUN["methods"] for s in RUN["seeds"]] + [(v, s) for v in RUN["attribution"] for s in RUN["attribution_seeds"]]
FIRST = RUN["benchmarks"][0]
EVALUATED = [(b, v, s) for b in RUN["benchmarks"] for v, s in [("base", 0), *TRAINED] if b == FIRST or v in ["base", *METHODS]]
if FIRST == "paircomp-scenes": EVALUATED.append((FIRST, "render", 0))   # what the judges give to true pictures

PAIRS = [f"{OUT}/pairs/pairs.json", f"{OUT}/pairs/funnel.parquet"]
TRAINING = [f"{OUT}/train/{v}-{s}/run.json" for v, s in TRAINED]
SCORES = {b: [f"{OUT}/scores/{b}/{v}-{s}.parquet" for c, v, s in EVALUATED if c == b] for b in RUN["benchmarks"]}
PAINTED = study_plan(ALIGNED[SCALE]) if ALIGNED[SCALE] else []
COARSE = sorted({coarse_stage(m) for _, m in PAINTED} - {None})
ALIGN = [f"{OUT}/align/{s}/{m}-{ALIGN_SEED}.{ending}" for s, m in PAINTED for ending in ("parquet", "npz")]
CURVES = [f"{OUT}/coarse/{c}-{ALIGN_SEED}/curve.csv" for c in COARSE]
SOFT_PARTS = [f"{OUT}/soft/{k}-{t}-{s}/run.json" for k, t, s in SOFTLY.train]
SOFT_PICTURES = [f"{OUT}/soft_pictures/{b}/{k}-{s}.json" for b, k, s in SOFTLY.generate] + [f"{OUT}/soft_edits/{b}/{e}-{s}.json" for b, e, s in SOFTLY.edit]
EXECUTED = f"{OUT}/notebooks/"
SHOWN = [f"{EXECUTED}74_score_folder.ipynb"] if SCALE != "paper" else []   # a lesson in the scene world, which no report reads

def experiment(stem): return f"nbs/experiments/{stem}.ipynb"

def version(folder, stem):
    "The code behind a notebook, for Snakemake to compare with the code of the last run."
    path = Path("nbs") / folder / f"{stem}.ipynb"
    return code_version(path) if path.exists() else "missing"

def starts_from(wildcards):
    "SFT starts from the zoo; everything after it starts from the SFT checkpoint of the same seed."
    return POLICY if wildcards.variant == "sft" else [f"{OUT}/train/sft-{wildcards.seed}/run.json"]

def judged(wildcards):
    return POLICY if wildcards.variant in ("base", "render") else [f"{OUT}/train/{wildcards.variant}-{wildcards.seed}/run.json"]

def painted_from(wildcards):
    "The tuned denoiser of a method, and the pictures that its fine stage looks at."
    stage, first = coarse_stage(wildcards.method), first_picture(wildcards.method)
    return DIFFUSION + [f"{OUT}/coarse/{stage}-{ALIGN_SEED}/run.json"] * bool(stage) + [f"{OUT}/align/{wildcards.benchmark}/{first}-{ALIGN_SEED}.npz"] * bool(first)

def soft_parts(kind, methods, seed):
    "What methods paint with: trained parts and tuned denoisers."
    trained, tuned = parts_of(kind, methods, seed)
    return soft_zoo(kind) + [f"{OUT}/soft/{p}/run.json" for p in trained] + [f"{OUT}/coarse/{d}/run.json" for d in tuned]

def soft_methods(w): return SOFTLY.generate[w.benchmark, w.kind, int(w.seed)]
def soft_edits(w): return SOFTLY.edit[w.benchmark, w.editor, int(w.seed)]
def listed(names): return "[" + ",".join(f"'{n}'" for n in names) + "]"   # as a parameter

def report_reads(wildcards):
    files = {"align": ALIGN, "soft": SOFT_PARTS + SOFT_PICTURES, "coarse": CURVES, "pairs": PAIRS, "training": TRAINING, **SCORES, "reports": [f"{EXECUTED}{s}.ipynb" for s in REPORTS if s != "99_index"]}
    names = report_needs(wildcards.stem, ["pairs", "training", *SCORES])
    return [f for name in names for f in files.get(name, [])] + sorted(map(str, Path("data/published").glob("*.csv")))

wildcard_constraints:
    variant = "[a-z_]+",
    seed = r"\d+",
    method = "[a-z0-9_]+",
    stage = "[a-z_]+",
    benchmark = "[a-z0-9_-]+",
    kind = "|".join(KINDS),
    training = "[a-z0-9_]+",
    editor = "|".join(EDITORS),
    stem = "|".join(REPORTS),

def gpus(rule): return GPUS.get(rule, 0) if SCALE == "paper" else 0

def torchrun(wildcards, resources):
    "Several GPUs are several processes, each of which executes the notebook."
    return f"-m torch.distributed.run --standalone --nproc_per_node {resources.gpu}" if int(resources.get("gpu", 0)) > 1 else ""

# The command that runs one notebook; {resources.seconds} is only a guess for the time left.
EXECUTE = "{PYTHON} -m focusdiff.pipeline run {input.notebook} {output.notebook} --seconds {resources.seconds} --threads {threads} -p scale {SCALE}"

# ---------------------------------------------------------------------------------------------------------------- the graph

if SCALE == "smoke":   # a check of the machinery: it never touches reports/
    rule all:
        input: f"{EXECUTED}99_index.ipynb", SHOWN
else:         # the target lies in out/: a fresh clone, which carries reports, runs like any other
    rule all:
        input: f"{OUT}/published"
    if not Path("reports/index.html").exists(): Path(f"{OUT}/published").unlink(missing_ok=True)

PAIR_SET = f" -p edits '{EDIT_SET}' -p filter_judge '{FILTER_JUDGE}' -p judge '{config.get('judge', FILTER_JUDGE)}'" if EDIT_SET and SCALE == "paper" else ""
SHARD_CARDS = [f"{OUT}/pairs/shards/{i:05d}-of-{PAIR_SHARDS:05d}.json" for i in range(PAIR_SHARDS)] if PAIR_SET else []

if PAIR_SET:           # a shard's log is no output, so that a stopped job goes on where it was
    rule build_shard:
        input: notebook=experiment("61_build_pairs")
        output: card=f"{OUT}/pairs/shards/{{shard}}-of-{PAIR_SHARDS:05d}.json", notebook=f"{EXECUTED}61_build_pairs-{{shard}}.ipynb"
        wildcard_constraints: shard=r"\d{5}"
        params: code=version("experiments", "61_build_pairs"), shard=lambda w: f"{int(w.shard)}/{PAIR_SHARDS}"
        resources: seconds=int(SECONDS["61_build_pairs"] * SPEED)
        priority: 100
        shell: EXECUTE + " -p seed 0 -p shard {params.shard}" + PAIR_SET

rule build_pairs:
    input: POLICY, SHARD_CARDS, notebook=experiment("61_build_pairs")
    output: *PAIRS, notebook=f"{EXECUTED}61_build_pairs.ipynb"
    params: code=version("experiments", "61_build_pairs")
    resources: seconds=int(SECONDS["61_build_pairs"] * SPEED)
    priority: 100
    shell: EXECUTE + " -p seed 0" + (PAIR_SET + " -p shard merge" if PAIR_SET else "") + " && rm -f {OUT}/pairs/log.jsonl"   # the log is for going on after a kill, not for another run

rule train_policy:
    input: starts_from, pairs=PAIRS, notebook=experiment("62_train_policy")
    output:   # the checkpoint to resume from is no output, so that Snakemake leaves it alone until the notebook is whole
        run=f"{OUT}/train/{{variant}}-{{seed}}/run.json",
        notebook=f"{EXECUTED}62_train_policy-{{variant}}-{{seed}}.ipynb"
    params: code=version("experiments", "62_train_policy"), torchrun=torchrun
    resources: seconds=int(SECONDS["62_train_policy"] * SPEED), gpu=gpus("train_policy")
    priority: 50
    shell: EXECUTE.replace("{PYTHON}", "{PYTHON} {params.torchrun}") + " -p variant {wildcards.variant} -p seed {wildcards.seed} && rm -rf {OUT}/train/{wildcards.variant}-{wildcards.seed}/state"

rule evaluate:
    input: judged, notebook=experiment("63_evaluate")
    output:
        scores=f"{OUT}/scores/{{benchmark}}/{{variant}}-{{seed}}.parquet",
        images=f"{OUT}/scores/{{benchmark}}/{{variant}}-{{seed}}.npz",
        notebook=f"{EXECUTED}63_evaluate-{{benchmark}}-{{variant}}-{{seed}}.ipynb"
    params: code=version("experiments", "63_evaluate")
    resources: seconds=int(SECONDS["63_evaluate"] * SPEED), gpu=gpus("evaluate")
    shell: EXECUTE + " -p variant {wildcards.variant} -p seed {wildcards.seed} -p benchmark {wildcards.benchmark}"

rule train_coarse:
    input: DIFFUSION, notebook=experiment("64_train_coarse")
    output:
        run=f"{OUT}/coarse/{{stage}}-{ALIGN_SEED}/run.json",
        curve=f"{OUT}/coarse/{{stage}}-{ALIGN_SEED}/curve.csv",
        notebook=f"{EXECUTED}64_train_coarse-{{stage}}.ipynb"
    params: code=version("experiments", "64_train_coarse")
    resources: seconds=int(SECONDS["64_train_coarse"] * SPEED), gpu=gpus("train_coarse")
    priority: 60
    shell: EXECUTE + " -p variant {wildcards.stage} -p seed {ALIGN_SEED} && rm -rf {OUT}/coarse/{wildcards.stage}-{ALIGN_SEED}/state"

rule paint:
    input: painted_from, notebook=experiment("65_paint")
    output:
        scores=f"{OUT}/align/{{benchmark}}/{{method}}-{ALIGN_SEED}.parquet",
        images=f"{OUT}/align/{{benchmark}}/{{method}}-{ALIGN_SEED}.npz",
        notebook=f"{EXECUTED}65_paint-{{benchmark}}-{{method}}.ipynb"
    params: code=version("experiments", "65_paint")
    resources: seconds=int(SECONDS["65_paint"] * SPEED), gpu=gpus("paint")
    shell: EXECUTE + " -p variant {wildcards.method} -p seed {ALIGN_SEED} -p benchmark {wildcards.benchmark}"

def shelved(wildcards):
    "The backbone's weights, and the training to take up if there is one."
    return soft_zoo(wildcards.kind) + sorted(map(str, Path(f"data/soft/{SCALE}/{wildcards.kind}-{wildcards.training}-{wildcards.seed}").glob("*")))

rule train_soft:
    input: shelved, notebook=experiment("66_train_soft")
    output:
        run=f"{OUT}/soft/{{kind}}-{{training}}-{{seed}}/run.json",
        part=f"{OUT}/soft/{{kind}}-{{training}}-{{seed}}/part.safetensors",
        cubes=f"{OUT}/soft/{{kind}}-{{training}}-{{seed}}/cubes.npz",
        notebook=f"{EXECUTED}66_train_soft-{{kind}}-{{training}}-{{seed}}.ipynb"
    params: code=version("experiments", "66_train_soft")
    resources: seconds=int(SECONDS["66_train_soft"] * SPEED), gpu=gpus("train_soft")
    priority: 40
    shell: EXECUTE + " -p kind {wildcards.kind} -p variant {wildcards.training} -p seed {wildcards.seed} && rm -rf {OUT}/soft/{wildcards.kind}-{wildcards.training}-{wildcards.seed}/state"

rule soft_generate:   # the pictures are no outputs, so that a stopped job goes on with the methods that are missing
    input: lambda w: soft_parts(w.kind, soft_methods(w), w.seed), notebook=experiment("67_soft_generate")
    output:
        painted=f"{OUT}/soft_pictures/{{benchmark}}/{{kind}}-{{seed}}.json",
        notebook=f"{EXECUTED}67_soft_generate-{{benchmark}}-{{kind}}-{{seed}}.ipynb"
    params: code=version("experiments", "67_soft_generate"), variants=lambda w: listed(soft_methods(w))
    resources: seconds=int(SECONDS["67_soft_generate"] * SPEED), gpu=gpus("soft_generate")
    priority: 30
    shell: EXECUTE + ' -p benchmark {wildcards.benchmark} -p kind {wildcards.kind} -p seed {wildcards.seed} -p variants "{params.variants}"'

rule soft_edit:       # ditto
    input: lambda w: soft_parts(EDITORS[w.editor], soft_edits(w), w.seed), notebook=experiment("72_soft_edit")
    output:
        edited=f"{OUT}/soft_edits/{{benchmark}}/{{editor}}-{{seed}}.json",
        notebook=f"{EXECUTED}72_soft_edit-{{benchmark}}-{{editor}}-{{seed}}.ipynb"
    params: code=version("experiments", "72_soft_edit"), variants=lambda w: listed(soft_edits(w))
    resources: seconds=int(SECONDS["72_soft_edit"] * SPEED), gpu=gpus("soft_edit")
    shell: EXECUTE + ' -p edit_set {wildcards.benchmark} -p editor {wildcards.editor} -p seed {wildcards.seed} -p variants "{params.variants}"'

rule score_folder:    # pictures and models from elsewhere
    input: POLICY, notebook=experiment("74_score_folder")
    output: notebook=f"{EXECUTED}74_score_folder.ipynb"
    params: code=version("experiments", "74_score_folder")
    resources: seconds=20
    shell: EXECUTE

rule report:
    input: report_reads, notebook="nbs/report/{stem}.ipynb"
    output: notebook=f"{EXECUTED}{{stem}}.ipynb"
    params: code=lambda w: version("report", w.stem)
    resources: seconds=SECONDS["report"]
    shell: EXECUTE

rule publish:
    input: f"{EXECUTED}99_index.ipynb", SHOWN, [f"{EXECUTED}{s}.ipynb" for s in REPORTS]
    output: touch(f"{OUT}/published")
    shell: "{PYTHON} -m focusdiff.pipeline publish {OUT} reports"
