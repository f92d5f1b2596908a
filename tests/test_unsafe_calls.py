"SECURITY.md says which risky parts of its libraries the package does not use: no module calls them."

import ast

import pytest
from conftest import ROOT

FUNCTIONS = {  # a call of any of these runs code that is in a file or in a text
    *("torch.load", "torch.jit.load", "torch.hub.load", "load_from_checkpoint", "read_pickle", "yaml.unsafe_load"),
    *("pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads", "dill.load", "joblib.load"),
    *("marshal.loads", "shelve.open", "os.system", "os.popen"),
}
ARGUMENTS = {"allow_pickle": True, "trust_remote_code": True, "weights_only": False, "shell": True}
PERMITTED = {"runs/isolation.py": {"pickle.loads"}}  # messages from the parent process, not files


def unsafe_calls(source):
    "Calls of `FUNCTIONS`, and calls with one of `ARGUMENTS`, as text."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            parts = {name, name.rpartition(".")[2]}
            yield from parts & FUNCTIONS
            for k in node.keywords:
                if k.arg in ARGUMENTS and getattr(k.value, "value", None) is ARGUMENTS[k.arg]:
                    yield f"{k.arg}={k.value.value}"


def test_no_module_calls_a_function_that_runs_the_code_in_a_file():
    package = ROOT / "modelfactory"
    calls = {str(f.relative_to(package)): set(unsafe_calls(f.read_text("utf8"))) for f in package.rglob("*.py")}
    assert len(calls) > 100 and {file: names for file, names in calls.items() if names} == PERMITTED


@pytest.mark.parametrize(
    "source, expected",
    [
        ("torch.load(file)", "torch.load"),
        ("Model.load_from_checkpoint(file)", "load_from_checkpoint"),
        ("pd.read_pickle(file)", "read_pickle"),
        ("np.load(file, allow_pickle=True)", "allow_pickle=True"),
        ("subprocess.run(text, shell=True)", "shell=True"),
    ],
)
def test_the_check_reports_calls(source, expected):
    assert list(unsafe_calls(source)) == [expected]
    assert list(unsafe_calls("np.load(file, allow_pickle=False); yaml.safe_load(text); model.load(file)")) == []
