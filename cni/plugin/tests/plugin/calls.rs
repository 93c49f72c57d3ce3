//! A node in a namespace of its own, and calls of a plugin in it.

use std::io::Write as _;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use weft_cni_netlink::namespace;
use weft_tests_harness::netns::Netns;

/// A node: its namespace, its folder, and the program that is called.
pub(crate) struct Node {
    pub(crate) netns: Netns,
    pub(crate) program: PathBuf,
    /// `CNI_ARGS`.
    pub(crate) args: &'static str,
    folder: tempfile::TempDir,
}

/// System calls that change something outside of the plugin, or ask the kernel about it.
pub(crate) const STEPS: [&str; 10] =
    ["mkdir", "flock", "pwrite64", "rename", "symlink", "unlink", "sendto", "setns", "write", "clone"];

/// The configuration as the agent writes it, for one plugin.
pub(crate) fn conf(node: &Node) -> Value {
    json!({
        "cniVersion": "1.1.0", "name": "weft", "type": "weft-cni", "bridge": "weft0", "mtu": 1450,
        "ipam": {"subnet": "10.42.1.0/24", "gateway": "10.42.1.1"}, "stateDir": node.folder.path(),
    })
}

/// The same with a range of each family, with room for 13 pods.
pub(crate) fn dual(node: &Node) -> Value {
    let mut config = conf(node);
    config["ipam"] = json!({"ranges": [
        {"subnet": "10.42.1.0/28", "gateway": "10.42.1.1"},
        {"subnet": "fd00:42:0:1::/64", "gateway": "fd00:42:0:1::1"},
    ]});
    config
}

/// What asks the same of the reference plugins.
pub(crate) fn reference(node: &Node) -> Value {
    json!({
        "cniVersion": "1.0.0", "name": "weft", "type": "bridge", "bridge": "weft0", "mtu": 1450,
        "isGateway": true, "isDefaultGateway": true, "hairpinMode": true,
        "ipam": {"type": "host-local", "subnet": "10.42.1.0/24", "gateway": "10.42.1.1", "dataDir": node.folder.path()},
    })
}

impl Node {
    pub(crate) fn new() -> Self {
        Self {
            netns: Netns::new("node").unwrap(),
            program: env!("CARGO_BIN_EXE_weft-cni").into(),
            args: "",
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// Makes what the first ADD of a node makes and later ones find.
    pub(crate) fn warm_up(&self) {
        self.warm_up_with(&conf(self));
    }

    pub(crate) fn warm_up_with(&self, config: &Value) {
        let pod = bare_pod();
        self.ok("ADD", "warm", Some(&pod), config);
        self.ok("DEL", "warm", Some(&pod), config);
    }

    fn start(&self, verb: &str, id: &str, netns: &str, input: &str) -> Child {
        let command: Command = self.netns.command(&self.program).unwrap();
        self.spawn(command, verb, id, netns, input)
    }

    fn spawn(&self, mut command: Command, verb: &str, id: &str, netns: &str, input: &str) -> Child {
        command
            .env_clear()
            .env("CNI_COMMAND", verb)
            .env("CNI_PATH", "/usr/lib/cni")
            .env("PATH", "/usr/sbin:/usr/bin");
        if !id.is_empty() {
            command
                .env("CNI_CONTAINERID", id)
                .env("CNI_IFNAME", "eth0")
                .env("CNI_NETNS", netns)
                .env("CNI_ARGS", self.args);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // One that is killed, or fails before it reads, closes the pipe; what it says then is what counts.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        child
    }

    fn call(&self, verb: &str, id: &str, netns: &str, input: &str) -> Output {
        self.start(verb, id, netns, input).wait_with_output().unwrap()
    }

    /// Calls, and takes the answer of a success.
    pub(crate) fn ok(&self, verb: &str, id: &str, pod: Option<&Netns>, config: &Value) -> Value {
        answer(verb, id, self.call(verb, id, &path(pod), &config.to_string()))
    }

    /// The same with another program.
    pub(crate) fn ok_of(
        &self,
        program: &str,
        verb: &str,
        id: &str,
        pod: Option<&Netns>,
        config: &Value,
    ) -> Value {
        let command = self.netns.command(program).unwrap();
        let child = self.spawn(command, verb, id, &path(pod), &config.to_string());
        answer(verb, id, child.wait_with_output().unwrap())
    }

    /// Calls, and takes the code of a failure.
    pub(crate) fn error(&self, verb: &str, id: &str, pod: Option<&Netns>, config: &Value) -> u64 {
        self.error_of_text(verb, id, pod, &config.to_string())
    }

    pub(crate) fn error_of_text(&self, verb: &str, id: &str, pod: Option<&Netns>, input: &str) -> u64 {
        failure(verb, &self.call(verb, id, &path(pod), input))
    }

    pub(crate) fn error_in(&self, verb: &str, id: &str, netns: &str, config: &Value) -> u64 {
        failure(verb, &self.call(verb, id, netns, &config.to_string()))
    }

    /// Calls, and kills the call before it makes a system call for the n-th time; whether it got that far.
    pub(crate) fn killed_before(
        &self,
        verb: &str,
        id: &str,
        pod: &Netns,
        config: &Value,
        (step, n): (&str, u32),
    ) -> bool {
        let mut command = self.netns.command("strace").unwrap();
        let inject = format!("inject={step}:signal=KILL:when={n}");
        command.args(["-qq", "-o", "/dev/null", "-e", &format!("trace={step}"), "-e", &inject]);
        command.arg(&self.program);
        let mut child = self.spawn(command, verb, id, &path(Some(pod)), &config.to_string());
        // strace ends as its program did.
        child.wait().unwrap().code().is_none()
    }

    /// The node's devices, addresses, routes and neighbours.
    pub(crate) fn state(&self) -> String {
        let show = |args: &[&str]| {
            let output = self.netns.command("ip").unwrap().args(args).output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        let links: Vec<String> = show(&["-o", "link"])
            .lines()
            .filter_map(|line| Some(line.split_whitespace().nth(1)?.to_owned()))
            .collect();
        let rest = [
            &["-4", "-o", "addr"][..],
            &["-4", "neigh", "show", "nud", "permanent"],
            &["-6", "-o", "addr", "show", "scope", "global"],
            &["-6", "neigh", "show", "nud", "permanent"],
        ];
        format!("{links:?}\n{}{:?}", rest.map(show).concat(), self.mapped())
    }

    /// The host ports, as nft lists them.
    pub(crate) fn mapped(&self) -> Vec<String> {
        let output = self.netns.command("nft").unwrap().args(["list", "ruleset"]).output().unwrap();
        let listed = String::from_utf8(output.stdout).unwrap();
        let elements = listed.lines().filter(|line| line.contains("elements = {"));
        elements.map(|line| line.trim().to_owned()).collect()
    }

    /// Where leases are.
    pub(crate) fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }

    /// How many addresses are held.
    pub(crate) fn leases(&self) -> usize {
        let network = self.folder.path().join("weft");
        weft_cni_ipam::Leases::open(&network).unwrap().all().unwrap().len()
    }
}

pub(crate) fn bare_pod() -> Netns {
    Netns::new("pod").unwrap()
}

fn path(pod: Option<&Netns>) -> String {
    pod.map(|pod| pod.path().display().to_string()).unwrap_or_default()
}

fn answer(verb: &str, id: &str, output: Output) -> Value {
    let said = String::from_utf8(output.stdout).unwrap();
    let more = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{verb} {id}: {said} {more}");
    if said.is_empty() { Value::Null } else { serde_json::from_str(&said).unwrap() }
}

fn failure(verb: &str, output: &Output) -> u64 {
    assert_eq!(output.status.code(), Some(1), "{verb}: {output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["cniVersion"].is_string() && !report["msg"].as_str().unwrap().is_empty(), "{report}");
    report["code"].as_u64().unwrap()
}

/// Below the second after which TCP sends a lost SYN again: the very first packet must get through.
pub(crate) const AT_ONCE: Duration = Duration::from_millis(500);

/// A connection from one namespace to an address of another, made at once.
pub(crate) fn connect(from: &Netns, to: &Netns, address: &str) {
    connect_within(from, to, address, AT_ONCE);
}

/// Whether a connection comes about.
pub(crate) fn reaches(from: &Netns, target: &str) -> bool {
    let target: std::net::SocketAddr = target.parse().unwrap();
    namespace::within(&from.path(), || TcpStream::connect_timeout(&target, AT_ONCE).is_ok()).unwrap()
}

pub(crate) fn connect_within(from: &Netns, to: &Netns, address: &str, patience: Duration) {
    let address: IpAddr = address.parse().unwrap();
    let listener = namespace::within(&to.path(), || TcpListener::bind((address, 0)).unwrap()).unwrap();
    let target = listener.local_addr().unwrap();
    let connected =
        namespace::within(&from.path(), || TcpStream::connect_timeout(&target, patience)).unwrap();
    assert!(connected.is_ok(), "{} to {target}: {connected:?}", from.name());
}

pub(crate) fn ip_in(netns: &Netns, args: &[&str]) {
    let output = netns.command("ip").unwrap().args(args).output().unwrap();
    assert!(output.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

pub(crate) fn links(netns: &Netns) -> String {
    let output = netns.command("ip").unwrap().args(["-o", "link"]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// The addresses of a result, without their prefix lengths.
pub(crate) fn addresses_of(result: &Value) -> Vec<String> {
    let ips = result["ips"].as_array().unwrap();
    let address = |ip: &Value| ip["address"].as_str().unwrap().split('/').next().unwrap().to_owned();
    ips.iter().map(address).collect()
}

/// A switch of a namespace, by its path below `/proc/sys/net`.
pub(crate) fn sysctl(netns: &Netns, name: &str) -> String {
    let path = format!("/proc/sys/net/{name}");
    let value = namespace::within(&netns.path(), || std::fs::read_to_string(path).unwrap()).unwrap();
    value.trim().to_owned()
}
