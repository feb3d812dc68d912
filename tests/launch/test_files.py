"""What can be checked of launchers without a cluster: syntax, fields, agreement."""

import shutil
import subprocess

import pytest

from tests import runs

LAUNCH = runs.ROOT / "launch"
SCRIPTS = [
    LAUNCH / n for n in ("environment.sh", "local.sh", "test.sh", "slurm.sbatch")
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_bash(path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if shellcheck := shutil.which("shellcheck"):
        done = subprocess.run([shellcheck, "-x", str(path)], capture_output=True)
        assert done.returncode == 0, done.stdout.decode()


def test_slurm_asks_for_what_resuming_needs():
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = [x.split()[1] for x in text.splitlines() if x.startswith("#SBATCH ")]
    assert "--requeue" in options and "--open-mode=append" in options
    assert "--signal=TERM@300" in options and "--ntasks-per-node=1" in options
    # sbatch stops reading options at the first command.
    first = text.index("\nset -uo")
    assert "#SBATCH" not in text[first:]


def test_the_jobset_names_its_coordinator_and_its_processes_alike():
    yaml = pytest.importorskip("yaml")
    path = LAUNCH / "kubernetes" / "jobset.yaml"
    found = yaml.safe_load(path.read_text())
    assert found["kind"] == "JobSet"
    spec, (job,) = found["spec"], found["spec"]["replicatedJobs"]
    inner = job["template"]["spec"]
    pod = inner["template"]["spec"]
    (container,) = pod["containers"]
    env = {e["name"]: e.get("value") for e in container["env"]}
    assert inner["completionMode"] == "Indexed"
    assert inner["parallelism"] == inner["completions"]
    assert env["JAX_NUM_PROCESSES"] == str(inner["completions"])
    host, port = env["JAX_COORDINATOR_ADDRESS"].split(":")
    name, subdomain = found["metadata"]["name"], spec["network"]["subdomain"]
    # Pod 0 of job 0, as JobSet names it.
    assert host == f"{name}-{job['name']}-0-0.{subdomain}"
    assert container["ports"] == [{"containerPort": int(port)}]
    mounted = {m["name"] for m in container["volumeMounts"]}
    assert mounted == {v["name"] for v in pod["volumes"]}
    codes = inner["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert codes["containerName"] == container["name"] and 75 not in codes["values"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy wants that.


def test_the_arguments_of_the_jobset_are_a_recipe_there_is():
    yaml = pytest.importorskip("yaml")
    from vitssl import main
    from vitssl.run import experiment

    found = yaml.safe_load((LAUNCH / "kubernetes" / "jobset.yaml").read_text())
    pod = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    flags = main.parse(pod["containers"][0]["args"])
    path = runs.ROOT / flags["config"]
    c = experiment.load(str(path), flags["overrides"])
    assert experiment.read(c).settings.data.root == "/data/imagenet"
