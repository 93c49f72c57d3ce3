//! The real kube-proxy, where there is one: `weft proxy` takes its place, and it takes weft's.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use weft_tests_e2e::machine::{ACCOUNT, ADDRESS, Machine, NAME, Running};
use weft_tests_e2e::traffic::Clients;
use weft_tests_e2e::{NODE_PORT, WEB, cluster, nginx};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::{require, wait_until};

const PATIENCE: Duration = Duration::from_secs(60);
/// A connection that nobody asks over asks itself this often: the server closes idle ones.
const KEEP: Duration = Duration::from_secs(5);
/// Beside weft's own proxy, which has kube-proxy's ports.
const HEALTH: u16 = 10_356;
/// With [`WEB`], every kind of chain that kube-proxy makes has a Service here that needs it.
const SERVICES: &str = "apiVersion: v1
kind: Service
metadata: {name: local}
spec:
  type: LoadBalancer
  externalTrafficPolicy: Local
  sessionAffinity: ClientIP
  loadBalancerSourceRanges: [192.0.2.0/24]
  externalIPs: [192.0.2.7]
  selector: {app: web}
  ports: [{port: 80}]
---
apiVersion: v1
kind: Service
metadata: {name: nobody}
spec:
  selector: {app: nobody}
  ports: [{name: tcp, port: 80}, {name: udp, port: 53, protocol: UDP}]
";

/// kube-proxy waits for its Node. Nothing shall be scheduled there.
fn add_node(cluster: &Cluster) -> anyhow::Result<()> {
    let node = format!(
        "apiVersion: v1
kind: Node
metadata: {{name: {NAME}}}
spec: {{unschedulable: true}}
status: {{addresses: [{{type: InternalIP, address: {ADDRESS}}}]}}
"
    );
    cluster.apply(&node).map(|_| ())
}

fn start_kube_proxy(machine: &Machine, mode: &str, log: &str) -> anyhow::Result<Running> {
    let mut command = machine.netns.command("kube-proxy")?;
    command.arg("--kubeconfig").arg(machine.kubeconfig());
    command.args(["--hostname-override", NAME, "--proxy-mode", mode, "--cluster-cidr", "10.42.0.0/16"]);
    command.args(["--healthz-bind-address", &format!("127.0.0.1:{HEALTH}")]);
    command.args(["--metrics-bind-address", "127.0.0.1:10349"]);
    // These are the machine's, and no namespace's.
    command.args(["--conntrack-max-per-core", "0", "--conntrack-tcp-timeout-established", "0"]);
    command.args(["--conntrack-tcp-timeout-close-wait", "0"]);
    Running::start(command, &machine.folder().join(log))
}

/// All rules of iptables and nftables, without what counts and without what is empty.
fn rules(machine: &Machine) -> anyhow::Result<String> {
    let mut all = String::new();
    for program in ["iptables-save", "ip6tables-save"] {
        let saved = machine.run(program, &[])?;
        let lines = saved.lines().filter(|line| !line.starts_with('#') && !line.contains(" ACCEPT ["));
        all.extend(lines.flat_map(|line| [line, "\n"]));
    }
    for family in ["ip", "ip6"] {
        all += &machine.run("nft", &["list", "tables", family])?;
    }
    Ok(all)
}

/// The rules that kube-proxy makes for the kubelet, and leaves to it: a node may be without.
fn remove_kubelets(machine: &Machine) -> anyhow::Result<()> {
    let script = "*filter\n-D INPUT -j KUBE-FIREWALL\n-D OUTPUT -j KUBE-FIREWALL\n-F KUBE-FIREWALL\n-X KUBE-FIREWALL\nCOMMIT\n";
    let path = machine.folder().join("kubelets");
    std::fs::write(&path, script)?;
    machine.run("iptables-restore", &["--noflush", &path.to_string_lossy()]).map(|_| ())
}

/// Whether kube-proxy's rules know the Service.
fn has_rules(machine: &Machine) -> anyhow::Result<bool> {
    let iptables = machine.run("iptables-save", &["-t", "nat"])?;
    let nftables = machine.run("nft", &["list", "ruleset", "ip"])?;
    Ok([iptables, nftables].iter().any(|rules| rules.contains("default/web")))
}

/// One connection that asks whenever it is told to.
struct Held {
    tell: mpsc::Sender<()>,
    told: mpsc::Receiver<anyhow::Result<()>>,
    thread: JoinHandle<anyhow::Result<()>>,
}

impl Held {
    fn open(machine: &Machine, to: SocketAddr) -> anyhow::Result<Self> {
        let (tell, asked) = mpsc::channel();
        let (answered, told) = mpsc::channel();
        let thread = machine.netns.thread(move || {
            let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            loop {
                match asked.recv_timeout(KEEP) {
                    Ok(()) => answered.send(exchange(&mut stream))?,
                    Err(mpsc::RecvTimeoutError::Timeout) => exchange(&mut stream)?,
                    Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(()),
                }
            }
        })?;
        let held = Self { tell, told, thread };
        held.ask()?;
        Ok(held)
    }

    fn ask(&self) -> anyhow::Result<()> {
        self.tell.send(()).context("there is no connection")?;
        self.told.recv_timeout(PATIENCE).context("the connection is gone")?.context("the held connection")
    }

    fn close(self) -> anyhow::Result<()> {
        drop(self.tell);
        self.thread.join().map_err(|panic| anyhow::anyhow!("{panic:?}"))?
    }
}

/// A request, and an answer that is seen whole by the pod's name at its end.
fn exchange(stream: &mut TcpStream) -> anyhow::Result<()> {
    stream.write_all(b"GET /hostname HTTP/1.1\r\nHost: web\r\n\r\n").context("send")?;
    let (mut answer, mut part) = (Vec::new(), [0; 1024]);
    loop {
        let length = stream.read(&mut part).context("receive")?;
        ensure!(length > 0, "closed after {:?}", String::from_utf8_lossy(&answer));
        answer.extend_from_slice(&part[..length]);
        let text = String::from_utf8_lossy(&answer);
        ensure!(text.starts_with("HTTP/1.1 200 "), "{text}");
        if text
            .split_once("\r\n\r\n")
            .is_some_and(|(_, body)| body.starts_with("web-") && body.ends_with('\n'))
        {
            return Ok(());
        }
    }
}

/// Waits until clients have had some more answers.
fn served(what: &str, clients: &[Clients]) -> anyhow::Result<()> {
    let before: Vec<u64> = clients.iter().map(Clients::answered).collect();
    let waited = wait_until(what, PATIENCE, || {
        let more = clients.iter().zip(&before).all(|(clients, before)| clients.answered() > before + 50);
        Ok(more.then_some(()))
    });
    waited.with_context(|| format!("{:?}", clients.iter().map(Clients::losses).collect::<Vec<_>>()))
}

/// kube-proxy's rules stay when it ends; weft takes over and removes them; kube-proxy comes back beside weft, which then goes.
fn there_and_back(mode: &str) -> anyhow::Result<()> {
    let test = format!("kube-proxy-{mode}");
    if !require(&test, &["iptables", "nft", "kube-proxy"]) {
        return Ok(());
    }
    let Some(mut cluster) = cluster(&test, "kpx", &[])? else { return Ok(()) };
    for manifest in [&nginx("web", 3), WEB, SERVICES, ACCOUNT] {
        cluster.apply(manifest)?;
    }
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"])?;
    add_node(&cluster)?;
    let service: IpAddr =
        cluster.kubectl(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"])?.parse()?;
    let machine = Machine::new(&cluster)?;
    machine.write_kubeconfig(&cluster)?;

    let mut kube_proxy = start_kube_proxy(&machine, mode, "first")?;
    wait_until("kube-proxy has rules", PATIENCE, || Ok(has_rules(&machine)?.then_some(())))
        .with_context(|| std::fs::read_to_string(machine.folder().join("first")).unwrap_or_default())?;
    let cluster_ip = SocketAddr::new(service, 80);
    let held = Held::open(&machine, cluster_ip)?;
    let mut clients = Vec::new();
    for to in [cluster_ip, SocketAddr::new(ADDRESS.parse()?, NODE_PORT)] {
        clients.push(Clients::start(&machine.netns, to, 2, Duration::from_millis(2))?);
    }
    served("kube-proxy serves", &clients)?;
    kube_proxy.end()?;
    if mode == "iptables" {
        remove_kubelets(&machine)?;
    }

    let log = machine.folder().join("weft");
    let mut weft = machine.start_weft_proxy(&cluster, &log)?;
    let said = || std::fs::read_to_string(&log).unwrap_or_default();
    let gone = wait_until("kube-proxy's rules are gone", PATIENCE, || {
        ensure!(weft.runs()?, "weft proxy ended");
        Ok(said().contains("removed kube-proxy's rules").then_some(()))
    });
    gone.with_context(said)?;
    served("weft serves", &clients)?;
    held.ask()?;
    let left = rules(&machine)?;
    machine.run("kube-proxy", &["--cleanup"])?;
    assert_eq!(left, rules(&machine)?, "kube-proxy's own clean-up finds nothing more");

    let _kube_proxy = start_kube_proxy(&machine, mode, "second")?;
    wait_until("kube-proxy is healthy", PATIENCE, || Ok(machine.get(HEALTH, "healthz").ok()))?;
    wait_until("its rules are back", PATIENCE, || Ok(has_rules(&machine)?.then_some(())))?;
    weft.end()?;
    let cleaned = machine.weft_proxy(&cluster, &["--cleanup"])?.output()?;
    assert!(cleaned.status.success(), "{}", String::from_utf8_lossy(&cleaned.stderr));
    served("kube-proxy serves again", &clients)?;
    held.ask()?;
    held.close()?;
    let left = rules(&machine)?.to_lowercase();
    assert!(!left.contains("weft-proxy"), "{left}");
    for clients in clients {
        let tally = clients.stop()?;
        assert_eq!(tally.lost, Vec::<String>::new(), "of {}", tally.answered());
    }
    cluster.purge()
}

#[test]
fn iptables_there_and_back() -> anyhow::Result<()> {
    there_and_back("iptables")
}

#[test]
fn nftables_there_and_back() -> anyhow::Result<()> {
    there_and_back("nftables")
}
