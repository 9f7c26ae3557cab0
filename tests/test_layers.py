"""The layers are walls: a file imports only from its own layer or a lower one."""

import ast
from pathlib import Path

import alignkit

ROOT = Path(alignkit.__file__).parent
LOOP = ["loop", "online", "collect", "buffer", "reduction", "mismatch", "guard", "together", "updates", "signals", "snapshot"]
LOOP += ["checkpoint"]
LAYERS = {
    0: ["errors", "plugins", "tensors", "divergences", "kl", "risk", "credit"],
    1: ["plan", "batches"],
    2: ["objectives", "losses"],
    3: ["policies", "rollout", "rewards", "judges", "data"],
    4: [*LOOP, "run", "progress", "oracles", "testing"],
}
CONFIG_ONLY = {"train_config"} | {f"{package}.config" for package in ("policies", "data", "rollout", "evaluation")}


def layer(module: str) -> int:
    name = module.removeprefix("alignkit.")
    if module == "alignkit" or any(name == c or name.startswith(f"{c}.") for c in CONFIG_ONLY):
        return -1
    top = module.split(".")[1] if "." in module else ""
    return next((number for number, names in LAYERS.items() if top in names), 5)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_files_import_their_own_layer_or_lower():
    wrong = []
    for path in ROOT.rglob("*.py"):
        name = ".".join(("alignkit", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for imported in imports(path):
            if imported.startswith("alignkit.") and name != "alignkit" and layer(imported) > layer(name) >= 0:
                wrong.append(f"{name} (layer {layer(name)}) imports {imported} (layer {layer(imported)})")
    assert not wrong, "\n".join(wrong)


def test_trl_and_model_classes_are_imported_in_one_file():
    for path in ROOT.rglob("*.py"):
        roots = {module.split(".")[0] for module in imports(path)}
        assert "trl" not in roots or path.name == "trl.py", path
        assert not any(m.startswith("transformers.AutoModel") for m in imports(path)) or path.name == "load.py", path


def test_the_loop_knows_no_objective():
    names = alignkit.objectives.OBJECTIVES
    for file in ("loop.py", "updates.py", "collect.py", "online.py", "reduction.py"):
        if (ROOT / file).exists():
            words = set((ROOT / file).read_text().lower().replace("_", " ").split())
            assert not words & set(names), f"{file} names an objective"
