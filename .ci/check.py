"""The house rules that a machine can check.

    python .ci/check.py              check this repository
    python .ci/check.py --selftest   break a small repository once per rule and see that the rule notices

Each rule is a generator over what is wrong, one line each, in the form `file: what, and what to do`.
"""
import argparse, ast, json, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path

MAX_CELL_LINES, MAX_OUTPUT_KB, MAX_NOTEBOOK_KB, MAX_PARAMETERS, MAX_IMPORT_SECONDS = 60, 60, 250, 6, 0.5


# ------------------------------------------------------------------------------------------------ reading

def library(root): return sorted((root / "nbs").glob("[0-5][0-9]_*.ipynb"))
def numbered(root): return sorted(p for folder in ("experiments", "report") for p in (root / "nbs" / folder).glob("*.ipynb"))
def notebooks(root): return [*library(root), *sorted((root / "nbs").glob("index.ipynb")), *numbered(root)]

def executed(root):
    "Copies with outputs that the repository keeps."
    return sorted((root / "reports" / "notebooks").glob("*.ipynb"))

def cells(path):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**c, "source": "".join(c["source"])} for c in found]

def code_cells(path): return [c for c in cells(path) if c["cell_type"] == "code"]
def is_exported(cell): return bool(re.search(r"^#\s*\|\s*exporti?\b", cell["source"], re.M))
def module_of(path):
    found = [m[1] for c in code_cells(path) if (m := re.search(r"^#\s*\|\s*default_exp\s+(\w+)", c["source"], re.M))]
    return found[0] if found else None

def plain(source):
    "Source without IPython magics, so that it parses."
    return "\n".join(re.sub(r"\S.*", "pass", line) if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines())

def export(root):
    "nbdev_export in the repository at `root`."
    command = [sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)

def texts(output):
    "Every piece of text in one output."
    data = output.get("data", {})
    parts = [output.get("text", ""), *(v for k, v in data.items() if k.startswith("text/") or k == "image/svg+xml"), output.get("traceback", [])]
    return ["".join(p) if isinstance(p, list) else str(p) for p in parts]

def imports(tree):
    "(module, names) for every import at any depth."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names: yield a.name, []
        elif isinstance(node, ast.ImportFrom):   # nbdev makes our own imports relative
            yield ".".join(filter(None, ["focusdiff" if node.level else "", node.module])), [a.name for a in node.names]

def ours(tree):
    "Names of our own modules that a tree imports."
    for module, names in imports(tree):
        if module == "focusdiff": yield from names
        elif module.startswith("focusdiff."): yield module.split(".")[1]


# ------------------------------------------------------------------------------------------------ the rules

def export_drift(root):
    "The package is what the notebooks export, nothing else."
    with tempfile.TemporaryDirectory() as d:
        copy = Path(d) / "copy"
        copy.mkdir()
        for name in ("settings.ini", "pyproject.toml"):
            if (root / name).exists(): shutil.copy(root / name, copy)
        for folder in ("nbs", "focusdiff"): shutil.copytree(root / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        run = export(copy)
        if run.returncode: yield f"nbs: nbdev_export fails:\n{run.stderr[-2000:]}"; return
        for new in sorted((copy / "focusdiff").glob("*.py")):
            old = root / "focusdiff" / new.name
            if not old.exists(): yield f"focusdiff/{new.name}: missing; run nbdev_export"
            elif old.read_text() != new.read_text(): yield f"focusdiff/{new.name}: differs from its notebook; edit the notebook and run nbdev_export"

def orphan_module(root):
    "Every module has a notebook of its own name."
    homes = {module_of(p): p for p in library(root)}
    for path in library(root):
        module = module_of(path)
        if module and path.stem[3:] != module: yield f"{path.name}: exports to {module}.py; the names must agree"
    for py in sorted((root / "focusdiff").glob("*.py")):
        if not py.stem.startswith("_") and py.stem not in homes: yield f"focusdiff/{py.name}: no notebook exports it; delete it"

def parameters_tag(root):
    "Experiments and reports have one cell tagged `parameters`, under the title, with at most six literals."
    for path in numbered(root):
        code = code_cells(path)
        tagged = [c for c in code if "parameters" in c["metadata"].get("tags", [])]
        if len(tagged) != 1: yield f"{path.name}: {len(tagged)} cells tagged `parameters`, expected one"; continue
        if tagged[0] is not next(c for c in code if not c["source"].lstrip().startswith("#| hide")):
            yield f"{path.name}: the parameters cell must be the first code cell, under the title"
        body = ast.parse(tagged[0]["source"]).body
        if len(body) > MAX_PARAMETERS: yield f"{path.name}: {len(body)} parameters, at most {MAX_PARAMETERS}"
        for node in body:
            try: ast.literal_eval(node.value)
            except (AttributeError, ValueError): yield f"{path.name}: `{ast.unparse(node)}` is not a literal"

def long_cell(root):
    "Exported cells fit on a screen."
    for path in library(root):
        for c in code_cells(path):
            lines = c["source"].count("\n") + 1
            if is_exported(c) and lines > MAX_CELL_LINES: yield f"{path.name}: an exported cell of {lines} lines (`{c['source'].splitlines()[1][:60]}`), at most {MAX_CELL_LINES}"

def leaked_variable(root):
    "Exported code uses no variable that only the notebook has."
    run = subprocess.run([sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "F821", "--output-format", "concise", "focusdiff"],
                         cwd=root, capture_output=True, text=True)
    if run.returncode > 1: yield f"ruff fails: {run.stderr.strip()}"
    # jaxtyping axes are names inside strings; ruff cannot know them
    axes = {"pair", "prompt", "group", "batch", "row", "token", "channel", "height", "width", "item", "vocabulary", "layer", "soft", "image", "text"}
    for line in run.stdout.splitlines():
        name = re.search(r"F821 Undefined name `(\w+)`", line)
        if name and name[1] not in axes: yield line
        elif "invalid-syntax" in line: yield line

def star_import(root):
    "Exported cells import by name."
    for path in library(root):
        for c in code_cells(path):
            if is_exported(c) and any("*" in names for _, names in imports(ast.parse(plain(c["source"])))): yield f"{path.name}: a star import in an exported cell"

def merge_marker(root):
    "No half-merged file."
    files = [*notebooks(root), *executed(root), *(root / "focusdiff").glob("*.py"), *root.glob("*.*"), root / "Makefile", root / "Snakefile", *(root / ".ci").glob("*")]
    for path in files:
        if path.is_file() and path.suffix not in (".png", ".pdf") and re.search(r'^[\s"]*(<{7} |>{7} |={7}(\\n)?[",]*$)', path.read_text(encoding="utf-8", errors="ignore"), re.M):
            yield f"{path.relative_to(root)}: merge markers"

PATHS = re.compile(r"(?<![\w./:<~…\])}-])/[A-Za-z_][\w.@+-]*/[\w.@+-]+|\b[A-Z]:\\\\?Users|(?:Posix|Windows)Path\(")   # any absolute path of two parts
ADDRESSES = re.compile(r"\b0x[0-9a-f]{6,}\b|\b(?!127\.0\.0\.1|0\.0\.0\.0)\d{1,3}(?:\.\d{1,3}){3}:\d+\b")
BARS = re.compile(r"\d+%\|.*\||\bit/s\b|s/it\b|[█▏▎▍▌▋▊▉]{2,}")
WARNINGS = re.compile(r"\b\w*Warning: |\[\w+\] WARNING")

def dirty_output(root):
    "No machine path, address, progress bar or warning in a kept output."
    for path in [*notebooks(root), *executed(root)]:
        for c in code_cells(path):
            for o in c["outputs"]:
                if o["output_type"] == "error": yield f"{path.name}: an output is an error: {o.get('ename')}"
                for text in texts(o):
                    for what, pattern in (("machine path", PATHS), ("address", ADDRESSES), ("progress bar", BARS), ("warning", WARNINGS)):
                        if m := pattern.search(text): yield f"{path.name}: {what} in an output: {m[0][:80]!r}"

def oversized_output(root):
    "Library notebooks stay light: a reader opens them, git keeps them."
    for path in library(root):
        kb = [len(json.dumps(o)) / 1024 for c in code_cells(path) for o in c["outputs"]]
        for k in kb:
            if k > MAX_OUTPUT_KB: yield f"{path.name}: an output of {k:.0f} KB, at most {MAX_OUTPUT_KB}"
        if path.stat().st_size / 1024 > MAX_NOTEBOOK_KB: yield f"{path.name}: {path.stat().st_size / 1024:.0f} KB, at most {MAX_NOTEBOOK_KB}"

def stored_output(root):
    "Sources of experiments and reports keep no outputs; their executed copies go to reports/notebooks."
    for path in numbered(root):
        if any(c["outputs"] for c in code_cells(path)): yield f"{path.name}: has outputs; clear them"

def import_direction(root):
    "Code flows up through the numbers."
    number = {module_of(p): int(p.stem[:2]) for p in library(root) if module_of(p)}
    for path in library(root):
        for c in code_cells(path):
            if not is_exported(c): continue
            for module in ours(ast.parse(plain(c["source"]))):
                if number.get(module, -1) >= int(path.stem[:2]): yield f"{path.name}: imports {module}, which has a number that is not smaller"
    for path in numbered(root):
        for c in code_cells(path):
            for module in ours(ast.parse(plain(c["source"]))):
                if not (root / "focusdiff" / f"{module}.py").exists(): yield f"{path.name}: imports focusdiff.{module}, which does not exist"

def _top_imports(path):
    "Modules that importing a file imports: not those inside functions."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [x for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom, ast.Try, ast.With)) for x in imports(node)]

def torch_in_report(root):
    "Report notebooks, and the modules they use, import no torch: a table takes seconds."
    heavy = {"torch", "transformers", "diffusers", "lightning"}
    for path in [p for p in numbered(root) if p.parent.name == "report"]:
        trees = [ast.parse(plain(c["source"])) for c in code_cells(path)]
        direct = [m for t in trees for m, _ in imports(t)]
        todo, seen = {m for t in trees for m in ours(t)}, {}
        while todo:
            name = todo.pop()
            py = root / "focusdiff" / f"{name}.py"
            if name in seen or not py.exists(): continue
            found = _top_imports(py)
            seen[name] = [m for m, _ in found]
            todo |= {n for m, names in found if m == "focusdiff" for n in names} | {m.split(".")[1] for m, _ in found if m.startswith("focusdiff.")}
        for where, modules in {"itself": direct, **{f"focusdiff.{k}": v for k, v in seen.items()}}.items():
            for m in sorted({m.split(".")[0] for m in modules} & heavy): yield f"{path.name}: {where} imports {m}; import it inside the function that needs it"

def slow_import(root):
    "`import focusdiff` is free."
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run = subprocess.run([sys.executable, "-c", "import focusdiff"], cwd=root, capture_output=True, text=True)
        times.append(time.perf_counter() - start)
        if run.returncode: yield f"import focusdiff fails: {run.stderr.strip().splitlines()[-1]}"; return
        if times[-1] < MAX_IMPORT_SECONDS: return
    yield f"import focusdiff takes {min(times):.2f} s at best, at most {MAX_IMPORT_SECONDS}"

RULES = [export_drift, orphan_module, parameters_tag, long_cell, leaked_variable, star_import, merge_marker, dirty_output, oversized_output, stored_output,
         import_direction, torch_in_report, slow_import]


# ------------------------------------------------------------------------------------------------ can each rule fail?

def write_notebook(path, *sources, outputs=(), tags=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    made = [dict(cell_type="markdown", id="title", metadata={}, source=f"# {path.stem}")]
    for i, source in enumerate(sources):
        kept = list(outputs) if i == len(sources) - 1 else []
        made.append(dict(cell_type="code", id=f"cell{i}", metadata={"tags": list(tags)} if tags and i == 0 else {}, source=source, outputs=kept, execution_count=None))
    meta = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
    path.write_text(json.dumps(dict(cells=made, metadata=meta, nbformat=4, nbformat_minor=5)))

def printed(text): return [dict(output_type="stream", name="stdout", text=text)]

def small_repository(root):
    "A repository of four notebooks that keeps every rule."
    (root / "settings.ini").write_text("[DEFAULT]\nrepo = focusdiff\nlib_name = focusdiff\nlib_path = focusdiff\nnbs_path = nbs\nversion = 0.0.1\nuser = u\nauthor = a\n"
                                       "branch = main\nmin_python = 3.10\nupdate_pyproject = False\nallowed_cell_metadata_keys = tags\n")
    write_notebook(root / "nbs/00_core.ipynb", "#| default_exp core", "#| export\ndef one(): return 1")
    write_notebook(root / "nbs/10_more.ipynb", "#| default_exp more", "#| export\nfrom focusdiff.core import one", "#| export\ndef two(): return 2 * one()")
    write_notebook(root / "nbs/experiments/60_try.ipynb", "seed = 0", "print(seed)", tags=["parameters"])
    write_notebook(root / "nbs/report/80_table.ipynb", "scale = 'tiny'", "from focusdiff.more import two", tags=["parameters"])
    (root / "focusdiff").mkdir()
    export(root).check_returncode()

def _breaks():
    "rule -> list of (what, how to break a small repository)."
    def edit(path, old, new): return lambda r: (r / path).write_text((r / path).read_text().replace(old, new))
    def report(*sources, **kw): return lambda r: write_notebook(r / "nbs/report/80_table.ipynb", *sources, **{"tags": ["parameters"], **kw})
    def core(*sources, **kw): return lambda r: write_notebook(r / "nbs/00_core.ipynb", "#| default_exp core", *sources, **kw)
    def add(path, text): return lambda r: (r / path).write_text(text)
    return {
        export_drift: [("an edited module", edit("focusdiff/core.py", "return 1", "return 3")), ("a changed notebook", core("#| export\ndef one(): return 5"))],
        orphan_module: [("a module without a notebook", add("focusdiff/lost.py", "x = 1")), ("another name", lambda r: (r / "nbs/10_more.ipynb").rename(r / "nbs/10_other.ipynb"))],
        parameters_tag: [("a stripped tag", report("scale = 'tiny'", tags=[])), ("a computed value", report("seed = 1 + len('a')")), ("an import", report("import os")),
                         ("seven names", report("\n".join(f"p{i} = {i}" for i in range(7)))), ("not under the title", lambda r: (report("x = 1", "seed = 0", tags=[])(r),
                          edit("nbs/report/80_table.ipynb", '"id": "cell1", "metadata": {}', '"id": "cell1", "metadata": {"tags": ["parameters"]}')(r)))],
        long_cell: [("61 lines", core("#| export\ndef one():\n" + "    x = 1\n" * 58 + "    return 1"))],
        leaked_variable: [("a notebook's variable", edit("focusdiff/core.py", "return 1", "return demo")), ("a syntax error", edit("focusdiff/core.py", "return 1", "return (1"))],
        star_import: [("a star", core("#| export\nfrom os import *"))],
        merge_marker: [("in a module", edit("focusdiff/core.py", "def one", "<<<<<<< HEAD\ndef one")), ("in a notebook", lambda r: (r / "nbs/00_core.ipynb").open("a").write("\n>>>>>>> other\n"))],
        dirty_output: [("a home folder", core("1", outputs=printed("saved to /home/someone/run"))), ("a folder of any name", core("1", outputs=printed("PosixPath('/scratch7/someone/run')"))), ("an address", core("1", outputs=printed("<object at 0x7f12ab34cd56>"))),
                       ("a bar", core("1", outputs=printed(" 42%|####      | 42/100"))), ("a warning", core("1", outputs=printed("FutureWarning: soon"))),
                       ("in an executed copy", lambda r: write_notebook(r / "reports/notebooks/80_table.ipynb", "1", outputs=printed("/root/x")))],
        oversized_output: [("61 KB", core("1", outputs=printed("x" * 62_000))), ("260 KB in all", core("1", outputs=[o for _ in range(5) for o in printed("x" * 53_000)]))],
        stored_output: [("a report with outputs", report("scale = 'tiny'", outputs=printed("1")))],
        import_direction: [("downwards", core("#| export\nfrom focusdiff.more import two")), ("nowhere", report("scale = 'tiny'", "from focusdiff.gone import x"))],
        torch_in_report: [("itself", report("scale = 'tiny'", "import torch")), ("a report of another paper", lambda r: write_notebook(r / "nbs/report/r01_table.ipynb", "scale = 'tiny'", "import torch", tags=["parameters"])), ("through a module of a module", edit("focusdiff/core.py", "def one", "import torch\ndef one"))],
        slow_import: [("a slow start", add("focusdiff/__init__.py", "import time; time.sleep(.6)")), ("a broken one", add("focusdiff/__init__.py", "1/0"))],
    }

def selftest():
    "Number of rules that cannot fail, or that complain about a good repository."
    wrong, tried = 0, 0
    with tempfile.TemporaryDirectory() as d:
        good = Path(d) / "good"
        good.mkdir()
        small_repository(good)
        breaks = _breaks()
        for rule in RULES:
            for what, breaker in [("nothing broken", None), *breaks[rule]]:
                bad = Path(d) / "bad"
                shutil.copytree(good, bad)
                if breaker: breaker(bad)
                found, tried = list(rule(bad)), tried + 1
                if bool(found) != bool(breaker): wrong += 1; print(f"  selftest: {rule.__name__}, {what}: found {found}")
                shutil.rmtree(bad)
    print(f"  selftest: {tried - wrong} of {tried} cases as expected")
    return wrong

def check(root):
    "Rule name -> problems."
    return {rule.__name__: list(rule(root)) for rule in RULES}

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--selftest", action="store_true", help="show that every rule can fail")
    if parser.parse_args().selftest: return int(selftest() > 0)
    results = check(Path(__file__).resolve().parent.parent)
    for rule, problems in results.items():
        print(f"{'ok  ' if not problems else 'FAIL'} {rule}")
        for p in problems: print(f"       {p}")
    failed = sum(map(bool, results.values()))
    print(f"{len(results) - failed} passed, {failed} failed")
    return int(failed > 0)

if __name__ == "__main__": sys.exit(main())
