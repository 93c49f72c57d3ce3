//! containerd calls the plugin, as in somebody else's cluster: `ctr run --cni` reads a network's list from `/etc/cni/net.d` and
//! executes `weft-cni` out of `/opt/cni/bin`.
//!
//! containerd has namespaces of its own, for processes too: what the test leaves behind ends with it.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use serde_json::json;
use weft_cni_ipam::{Lease, Leases};
use weft_tests_harness::netns::Netns;
use weft_tests_harness::{require, wait_until, which};

const PATIENCE: Duration = Duration::from_secs(30);
const NETWORK: &str = "theirs";

/// Binds the folders that containerd and `ctr` look into; nothing of the machine's own is written to.
const SETUP: &str = "mount --make-rprivate / && mount -t overlay overlay -o lowerdir=$0/etc:/etc /etc \
                     && mount --bind $0/opt /opt && mount -t tmpfs tmpfs /run && exec containerd --config $0/config.toml";

struct Containerd {
    node: Netns,
    folder: tempfile::TempDir,
    /// `unshare`: with it goes containerd, and with that one every process of its namespace.
    unshare: Child,
    pid: String,
}

impl Containerd {
    fn start() -> Self {
        let (node, folder) = (Netns::new("ctrd").unwrap(), tempfile::tempdir().unwrap());
        lay_out(folder.path());
        let mut unshare = node.command("unshare").unwrap();
        unshare.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", SETUP]);
        let log = fs::File::create(folder.path().join("log")).unwrap();
        unshare.arg(folder.path()).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let unshare = unshare.spawn().unwrap();
        let mut containerd = Self { node, folder, unshare, pid: String::new() };
        let children = format!("/proc/{0}/task/{0}/children", containerd.unshare.id());
        containerd.pid = wait_until("unshare has a child", PATIENCE, || {
            let said = fs::read_to_string(&children)?;
            Ok(said.split_whitespace().next().map(str::to_owned))
        })
        .unwrap();
        let answers = || Ok(containerd.ctr(&["version"]).status.success().then_some(()));
        wait_until("containerd answers", PATIENCE, answers).unwrap_or_else(|error| {
            let log = fs::read_to_string(containerd.folder.path().join("log")).unwrap_or_default();
            panic!("{error}: {log}");
        });
        containerd
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command.args(["--signal=KILL", "60", "nsenter", "--target", &self.pid, "--mount", "--pid", "--net"]);
        command.arg("ctr").arg("--address").arg(self.folder.path().join("c.sock")).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn ctr(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Starts a container that sleeps. It is `ctr` that calls the plugin, before and after.
    fn run(&self, name: &str) -> Child {
        let path = |name: &str| self.folder.path().join(name).display().to_string();
        let (fifo, rootfs) = (path("fifo"), path("rootfs"));
        let mut args = vec!["run", "--rm", "--cni", "--fifo-dir", &fifo, "--rootfs", &rootfs, name];
        args.extend(["/bin/busybox", "sleep", "1000"]);
        self.command(&args).spawn().unwrap()
    }

    /// What a program within a container says; `None` if it fails, as while there is no such container.
    fn within(&self, name: &str, id: &str, program: &[&str]) -> Option<String> {
        let fifo = self.folder.path().join("fifo").display().to_string();
        let mut args = vec!["task", "exec", "--fifo-dir", &fifo, "--exec-id", id, name, "/bin/busybox"];
        args.extend(program);
        let output = self.ctr(&args);
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
    }

    fn leases(&self) -> Vec<Lease> {
        Leases::open(&self.folder.path().join("leases").join(NETWORK)).unwrap().all().unwrap()
    }

    /// The node's devices but loopback.
    fn devices(&self) -> Vec<String> {
        let output = self.node.command("ip").unwrap().args(["-o", "link"]).output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        let names = said.lines().filter_map(|line| line.split(": ").nth(1));
        names.map(|name| name.split('@').next().unwrap().to_owned()).filter(|name| name != "lo").collect()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
    }
}

/// The folders that containerd finds as `/etc/cni` and `/opt/cni`, its configuration, and what the containers have for files.
fn lay_out(folder: &Path) {
    for name in
        ["etc/cni/net.d", "opt/cni/bin", "rootfs/bin", "rootfs/proc", "rootfs/dev", "rootfs/sys", "fifo"]
    {
        fs::create_dir_all(folder.join(name)).unwrap();
    }
    fs::copy(env!("CARGO_BIN_EXE_weft-cni"), folder.join("opt/cni/bin/weft-cni")).unwrap();
    let busybox: PathBuf = which("busybox").unwrap();
    fs::copy(busybox, folder.join("rootfs/bin/busybox")).unwrap();
    let list = json!({"cniVersion": "1.0.0", "name": NETWORK, "plugins": [{
        "type": "weft-cni", "bridge": "weft0", "mtu": 1450, "stateDir": folder.join("leases"),
        "ipam": {"subnet": "10.66.0.0/24", "gateway": "10.66.0.1"},
    }]});
    fs::write(folder.join("etc/cni/net.d/10-weft.conflist"), list.to_string()).unwrap();
    let at = folder.display();
    let config = format!(
        "version = 2\nroot = \"{at}/root\"\nstate = \"{at}/state\"\n\
         disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\"]\n\
         [grpc]\naddress = \"{at}/c.sock\"\n"
    );
    fs::write(folder.join("config.toml"), config).unwrap();
}

#[test]
fn containerd_attaches_and_detaches_containers() {
    let needs = ["root", "ip", "containerd", "ctr", "runc", "unshare", "nsenter", "busybox"];
    if !require("cni::containerd", &needs) {
        return;
    }
    let containerd = Containerd::start();
    // The kernel names the cgroups of two tests at once by these.
    let names = ["a", "b"].map(|name| format!("weft-{name}-{}", std::process::id()));
    let running = names.each_ref().map(|name| containerd.run(name));
    let addresses = names.each_ref().map(|name| {
        let attached = || Ok(containerd.within(name, "up", &["ip", "-4", "addr", "show", "dev", "eth0"]));
        let said = wait_until("the container runs", PATIENCE, attached).unwrap();
        let word = said.split_whitespace().skip_while(|word| *word != "inet").nth(1).unwrap();
        word.strip_suffix("/24").unwrap().to_owned()
    });
    assert_ne!(addresses[0], addresses[1]);
    let held: Vec<String> = containerd.leases().iter().map(|lease| lease.address.to_string()).collect();
    assert!(held.len() == 2 && addresses.iter().all(|address| held.contains(address)), "{held:?}");
    assert_eq!(containerd.devices().len(), 3, "the bridge and two ports: {:?}", containerd.devices());
    let ping =
        |name: &str, id: &str, to: &str| containerd.within(name, id, &["ping", "-c", "1", "-W", "5", to]);
    assert!(ping(&names[0], "there", &addresses[1]).is_some());
    assert!(ping(&names[1], "back", &addresses[0]).is_some());
    assert!(ping(&names[1], "out", "10.66.0.1").is_some());
    assert!(ping(&names[1], "nobody", "10.66.0.77").is_none());

    for (name, ctr) in names.iter().zip(running) {
        assert!(containerd.ctr(&["task", "kill", "--signal", "KILL", name]).status.success());
        // It ends after the plugin, with the container's own code.
        let output = ctr.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(137), "{}", String::from_utf8_lossy(&output.stderr));
    }
    assert_eq!(containerd.leases(), []);
    assert_eq!(containerd.devices(), ["weft0"]);
}
