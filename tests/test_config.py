"""Host files: those of the lab load, and errors name file, line and the nearest known word."""

import pytest
import yaml
from arm_kvm.host import config
from arm_kvm.support.errors import ConfigError
from arm_kvm.support.paths import CONFIGS

GOOD = (CONFIGS / "hosts/arm64.yaml").read_text()


@pytest.fixture
def host_file(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("name", config.host_names())
def test_shipped_hosts_load(name):
    host = config.find(name)
    assert host.name == name and host.board.cpus >= 1
    assert host.architecture.name == {"arm": "armv7", "arm64": "armv8"}[host.linux_arch]


def test_a_host_file_is_found_by_path(host_file):
    assert config.find(str(host_file(GOOD))).board.cpu == "cortex-a57"


def test_timeouts_override_the_defaults(host_file):
    host = config.load(host_file(GOOD + "timeouts: {ssh: 90}\n"))
    assert host.timeouts["ssh"] == 90.0 and host.timeouts["init"] == config.TIMEOUTS["init"]


WRONG = {
    "misspelt key": ("cmdline:", "comandline:", r"mine.yaml:\d+: unknown key 'comandline'.*did you mean 'cmdline'"),
    "unknown key": ("cmdline:", "colour:", r"unknown key 'colour'.*known keys: board, kernel"),
    "misspelt board key": ("  cpus:", "  cpu_count:", r"mine.yaml:6: unknown key 'cpu_count' in board"),
    "missing key": ("  cpu: cortex-a57\n", "", "board lacks the key 'cpu'"),
    "unknown source": ("source: deb", "source: dep", r"mine.yaml:\d+: source: 'dep' is not known; did you mean 'deb'"),
    "unknown QEMU": ("qemu-system-aarch64", "qemu-system-aarch46", "did you mean 'qemu-system-aarch64'"),
    "no virtualization": (",virtualization=on", "", "impossible board.*virtualization=on"),
    "too many CPUs": ("cpus: 2", "cpus: 9", "impossible board: a GICv2 serves 8 CPUs"),
    "CPUs not a number": ("cpus: 2", "cpus: two", "'two' is not a number from 1 to 64"),
    "memory": ("memory: 1G", "memory: 1T", "'1T' is not a size like 512M or 1G"),
    "little memory": ("memory: 1G", "memory: 64M", "not between 128M and 64G"),
    "wrong user space": (
        "qemu-system-aarch64",
        "qemu-system-arm",
        "impossible board: qemu-system-arm does not run arm64",
    ),
    "unknown guest": ("[A64, A32]", "[A64, T32]", "'T32' is not known; one of: A32, A64"),
    "unknown capability": ("can: [kvm,", "can: [kmv,", "can: 'kmv' is not known; did you mean 'kvm'"),
    "made-up capability": ("can: [kvm,", "can: [teleport, kvm,", "can: 'teleport' is not known; one of: kvm, a15"),
    "KVM without guests": ("[A64, A32]", "[]", "a host that can kvm names its guests' instruction sets"),
    "32-bit CPU": ("cpu: cortex-a57", "cpu: cortex-a15", "a cortex-a15 is a 32-bit CPU, and rootfs is arm64"),
    "package of another architecture": (
        "linux-image-arm64",
        "linux-image-armmp",
        "is for another architecture; rootfs is",
    ),
    "long command line": ("console=ttyAMA0", f"console=ttyAMA0 {'x' * 2048}", "an arm64 kernel keeps 2034 characters"),
    "a reserved word": ("console=", "rdinit=/bin/sh console=", "'rdinit=/bin/sh' is set by the lab"),
    "list expected": ("[A64, A32]", "A64", "is not a list of names"),
    "unknown time-out": ("guests:", "timeouts: {shs: 3}\nguests:", "unknown key 'shs' in timeouts; did you mean 'ssh'"),
    "mapping expected": ("guests:", "timeouts: 3\nguests:", "timeouts must be a mapping"),
    "a list as a key": ("board:", "[1, 2]: 3\nboard:", r"mine.yaml:\d+: the host file has a key that is not text"),
    "not YAML": ("board:", "board: [", r"mine.yaml:\d+: not YAML"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_host_file_is_said_precisely(host_file, what):
    old, new, message = WRONG[what]
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        config.load(host_file(text))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[arm-virt, lab]", "[arm64-virt, lab]", "'arm64-virt' is for another architecture; rootfs is armhf"),
        ("guests: [A32]", "guests: [A32, A64]", "a 32-bit host has no A64 guests"),
    ],
)
def test_what_does_not_go_with_a_32_bit_board(host_file, old, new, words):
    with pytest.raises(ConfigError, match=words):
        config.load(host_file((CONFIGS / "hosts/a15.yaml").read_text().replace(old, new)))


def test_a_32_bit_board_with_too_much_memory(host_file):
    text = (CONFIGS / "hosts/a15.yaml").read_text().replace("memory: 1G", "memory: 8G")
    with pytest.raises(ConfigError, match="32-bit board"):
        config.load(host_file(text))


@pytest.mark.parametrize("keys", ["{url: 'http://x/y.tar.xz', path: y}", "{}"])
def test_a_tarball_has_one_place(host_file, keys):
    host = yaml.safe_load(GOOD)
    host["kernel"] = {"source": "tarball", "sha256": "0" * 64, "fragments": ["lab"], **yaml.safe_load(keys)}
    with pytest.raises(ConfigError, match="either a url or a path"):
        config.load(host_file(yaml.safe_dump(host)))


def test_empty_and_missing_files(host_file, tmp_path):
    with pytest.raises(ConfigError, match="empty"):
        config.load(host_file(""))
    with pytest.raises(ConfigError, match="No such file"):
        config.load(tmp_path / "none.yaml")


def test_unknown_host_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'arm64'"):
        config.find("arm46")
