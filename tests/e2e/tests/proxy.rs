//! `weft proxy` on a machine of a cluster that knows nothing of it, taking over from kube-proxy's rules.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use weft_tests_e2e::traffic::Clients;
use weft_tests_e2e::{cluster, eventually, nginx};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::netns::{Netns, ip};
use weft_tests_harness::{require, wait_until};

const PATIENCE: Duration = Duration::from_secs(30);
const ACCOUNT: &str = include_str!("../../../docs/samples/proxy.yaml");
const SERVICE: &str = "apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{port: 80}]
";

/// A machine beside the node: it can reach pods and the API by their addresses, and no more.
struct Machine {
    netns: Netns,
    folder: tempfile::TempDir,
    cgroup: String,
}

impl Machine {
    fn new(cluster: &Cluster) -> anyhow::Result<Self> {
        let netns = Netns::new("prx")?;
        let node = cluster.netns.name();
        ip(&[
            "-n",
            node,
            "link",
            "add",
            "to-prx",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            netns.name(),
        ])?;
        ip(&["-n", node, "addr", "add", "10.77.0.1/24", "dev", "to-prx"])?;
        ip(&["-n", node, "link", "set", "to-prx", "up"])?;
        ip(&["-n", netns.name(), "addr", "add", "10.77.0.2/24", "dev", "eth0"])?;
        ip(&["-n", netns.name(), "link", "set", "eth0", "up"])?;
        ip(&["-n", netns.name(), "route", "add", "default", "via", "10.77.0.1"])?;
        let folder = tempfile::tempdir()?;
        Ok(Self { netns, folder, cgroup: format!("/weft-proxy-{}", std::process::id()) })
    }

    fn pins(&self) -> PathBuf {
        self.folder.path().join("bpf")
    }

    fn weft_proxy(&self, cluster: &Cluster, more: &[&str]) -> anyhow::Result<Command> {
        let kubeconfig = self.folder.path().join("kubeconfig");
        let mut command =
            weft_tests_harness::netns::command_in(&self.netns.path(), cluster.weft()?.get_program())?;
        command.args(["proxy", "--hostname-override", "stranger", "--cgroup", &self.cgroup]);
        command.arg("--kubeconfig").arg(kubeconfig).arg("--pin-dir").arg(self.pins()).args(more);
        Ok(command)
    }

    /// Runs a program to its end and answers what it wrote.
    fn run(&self, program: &str, args: &[&str]) -> anyhow::Result<String> {
        let output = self.netns.command(program)?.args(args).output().with_context(|| program.to_owned())?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program} {}: {}", args.join(" "), said.trim());
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Asks the proxy's own server.
    fn get(&self, port: u16, path: &str) -> anyhow::Result<String> {
        let request = format!("GET /{path} HTTP/1.0\r\n\r\n");
        let asked = self.netns.thread(move || {
            let mut stream = TcpStream::connect(("127.0.0.1", port))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(request.as_bytes())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            ensure!(answer.contains(" 200 OK"), "{answer}");
            Ok(answer)
        })?;
        asked.join().map_err(|panic| anyhow::anyhow!("{panic:?}"))?
    }

    /// The kubeconfig of the sample's service account.
    fn write_kubeconfig(&self, cluster: &Cluster) -> anyhow::Result<()> {
        let token = cluster.kubectl(&["create", "token", "weft-proxy", "-n", "kube-system"])?;
        let path = "jsonpath={.clusters[0].cluster.certificate-authority-data}";
        let authority = cluster.kubectl(&["config", "view", "--raw", "-o", path])?;
        let text = format!(
            "apiVersion: v1
kind: Config
clusters:
- name: c
  cluster: {{server: \"https://10.77.0.1:6443\", tls-server-name: kubernetes, certificate-authority-data: {authority}}}
users:
- name: u
  user: {{token: {token}}}
contexts:
- name: c
  context: {{cluster: c, user: u}}
current-context: c
"
        );
        Ok(std::fs::write(self.folder.path().join("kubeconfig"), text)?)
    }
}

/// What was started is ended whatever happens.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// kube-proxy's shape: a jump, the Service, its only endpoint.
fn kube_proxy_rules(machine: &Machine, service: IpAddr, pod: &str) -> anyhow::Result<()> {
    let (service, pod) = (format!("{service}/32"), format!("{pod}:80"));
    let rules: [&[&str]; 6] = [
        &["-N", "KUBE-SERVICES"],
        &["-N", "KUBE-SVC-WEB"],
        &["-N", "KUBE-KUBELET-CANARY"],
        &["-A", "OUTPUT", "-m", "comment", "--comment", "kubernetes service portals", "-j", "KUBE-SERVICES"],
        &["-A", "KUBE-SERVICES", "-d", &service, "-p", "tcp", "--dport", "80", "-j", "KUBE-SVC-WEB"],
        &["-A", "KUBE-SVC-WEB", "-p", "tcp", "-j", "DNAT", "--to-destination", &pod],
    ];
    for rule in rules {
        machine.run("iptables", &[&["-w", "-t", "nat"], rule].concat())?;
    }
    Ok(())
}

fn start(machine: &Machine, cluster: &Cluster, log: &Path) -> anyhow::Result<Running> {
    let log = std::fs::File::create(log)?;
    let mut command = machine.weft_proxy(cluster, &["--cleanup-kube-proxy"])?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    Ok(Running(command.spawn().context("start weft proxy")?))
}

#[test]
fn it_takes_over_from_kube_proxy_and_outlives_its_process() -> anyhow::Result<()> {
    if !require("proxy", &["iptables"]) {
        return Ok(());
    }
    let Some(mut cluster) = cluster("proxy", "prx", &[])? else { return Ok(()) };
    cluster.apply(&nginx("web", 3))?;
    cluster.apply(SERVICE)?;
    cluster.apply(ACCOUNT)?;
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"])?;
    let service: IpAddr =
        cluster.kubectl(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"])?.parse()?;
    let pod =
        cluster.kubectl(&["get", "pods", "-l", "app=web", "-o", "jsonpath={.items[0].status.podIP}"])?;
    let machine = Machine::new(&cluster)?;
    machine.write_kubeconfig(&cluster)?;
    kube_proxy_rules(&machine, service, &pod)?;

    let clients = Clients::start(&machine.netns, SocketAddr::new(service, 80), 2, Duration::from_millis(2))?;
    wait_until("kube-proxy's rules serve", PATIENCE, || Ok((clients.answered() > 10).then_some(())))?;
    let log = machine.folder.path().join("log");
    let mut proxy = start(&machine, &cluster, &log)?;
    let said = || std::fs::read_to_string(&log).unwrap_or_default();
    let rules = || machine.run("iptables-save", &["-t", "nat"]);
    let taken = wait_until("kube-proxy's rules are gone", PATIENCE, || {
        ensure!(proxy.0.try_wait()?.is_none(), "weft proxy ended");
        Ok((!rules()?.contains("KUBE-S")).then_some(()))
    });
    taken.with_context(said)?;
    assert!(rules()?.contains("KUBE-KUBELET-CANARY"), "the kubelet's stay");
    let answered = clients.answered();
    wait_until("weft serves", PATIENCE, || Ok((clients.answered() > answered + 50).then_some(())))?;

    assert!(machine.get(10_256, "livez")?.contains("lastUpdated"));
    let metrics = machine.get(10_249, "metrics")?;
    assert!(metrics.contains("kubeproxy_sync_proxy_rules_duration_seconds_count"), "{metrics}");

    // Changes arrive, and with the process dead what was there goes on.
    cluster.kubectl(&["scale", "deployment/web", "--replicas=1"])?;
    eventually(
        &cluster,
        &["get", "endpoints", "web", "-o", "jsonpath={.subsets[*].addresses[*].ip}"],
        |ips| !ips.is_empty() && !ips.contains(' '),
    )?;
    proxy.0.kill()?;
    proxy.0.wait()?;
    let answered = clients.answered();
    wait_until("it serves while dead", PATIENCE, || Ok((clients.answered() > answered + 50).then_some(())))
        .with_context(|| format!("{:?}", clients.losses()))?;
    let tally = clients.stop()?;
    assert_eq!(tally.lost, Vec::<String>::new(), "of {}", tally.answered());

    let cleaned = machine.weft_proxy(&cluster, &["--cleanup"])?.output()?;
    assert!(cleaned.status.success(), "{}", String::from_utf8_lossy(&cleaned.stderr));
    assert!(!machine.pins().exists());
    let cgroup = Path::new("/sys/fs/cgroup/unified").join(machine.cgroup.trim_start_matches('/'));
    assert!(!cgroup.exists(), "{} is left", cgroup.display());
    cluster.purge()
}
