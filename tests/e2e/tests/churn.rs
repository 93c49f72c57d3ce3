//! Connections without end while Services change, pods roll, agents die and a node is lost. `WEFT_CHURN` says how many
//! connections at least; a run of a million is what was promised, a short one is part of every test run.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use weft_tests_e2e::churn::{Askers, Loss, Way};
use weft_tests_e2e::{agent_of, cluster, eventually, image_archive, sleeper};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::netns::ip;
use weft_tests_harness::wait_until;

const CONNECTIONS: u64 = 50_000;
const PATIENCE: Duration = Duration::from_secs(60);
/// The node that the clients are on, and the one that is lost.
const HERE: &str = "node-1";
const LOST: &str = "node-3";
/// Clients of each kind and place.
const CLIENTS: usize = 3;

const WORKLOAD: &str = "apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 6
  strategy: {rollingUpdate: {maxSurge: 3, maxUnavailable: 0}}
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 5
      containers:
      - name: main
        image: weft-probe:1
        command: [weft-probe, serve, 80/tcp, 80/udp]
        readinessProbe: {tcpSocket: {port: 80}, periodSeconds: 1}
        lifecycle: {preStop: {sleep: {seconds: 2}}}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports:
  - {name: stream, port: 80, protocol: TCP}
  - {name: datagram, port: 80, protocol: UDP}
";

#[test]
fn nothing_is_lost_but_with_its_backend() -> anyhow::Result<()> {
    let flags = ["--nodes", "3", "--node-monitor-grace-period", "20"];
    let Some(mut cluster) = cluster("churn", "churn", &flags)? else { return Ok(()) };
    let wanted = std::env::var("WEFT_CHURN").map_or(Ok(CONNECTIONS), |count| count.parse())?;
    cluster.import(&image_archive("probe")?)?;
    cluster.apply(WORKLOAD)?;
    cluster.apply(&sleeper("client", Some(HERE)))?;
    cluster.kubectl(&["wait", "pod/client", "--for=condition=Ready", "--timeout=120s"])?;
    rolled_out(&cluster)?;
    let address = cluster.kubectl(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"])?;
    let load = Load::start(&cluster, SocketAddr::new(address.parse()?, 80))?;
    load.answers("the Service answers", 200)?;

    // Until the last tenth, which is for the loss of a node.
    let mut rounds = 0;
    while load.connections() < wanted / 10 * 9 || rounds == 0 {
        rounds += 1;
        for (what, change) in CHANGES {
            let begin = Instant::now();
            change(&cluster, rounds).with_context(|| format!("{what}, round {rounds}"))?;
            load.answers(what, 500)?;
            let new = load.losses_since(begin);
            ensure!(
                new.is_empty(),
                "{what}, round {rounds}: {} lost: {new:?}\n{}",
                new.len(),
                cluster.log_tail()
            );
        }
        eprintln!("round {rounds}: {} connections, {} datagrams", load.connections(), load.datagrams());
    }
    lose_a_node(&cluster, &load)?;
    let begin = Instant::now();
    let missing = wanted.saturating_sub(load.connections()).max(2_000);
    load.answers("what is left of the cluster answers", missing)?;
    // One that began before may be given up only now.
    let late: Vec<_> = load.losses_since(begin).into_iter().filter(|loss| loss.begun >= begin).collect();
    ensure!(late.is_empty(), "lost after the node's endpoints were gone: {late:?}");
    eprintln!("{} connections, {} datagrams in {rounds} rounds", load.connections(), load.datagrams());
    load.stop()?;
    cluster.purge()
}

type Change = fn(&Cluster, usize) -> anyhow::Result<()>;

const CHANGES: [(&str, Change); 4] = [
    ("the Service changes", service_changes),
    ("the Deployment is scaled", scale),
    ("the pods roll", roll),
    ("agents are killed", kill_agents),
];

/// Its type, ports and affinity; never its address.
fn service_changes(cluster: &Cluster, round: usize) -> anyhow::Result<()> {
    let patches = [
        r#"{"spec":{"ports":[{"name":"more","port":81,"targetPort":80,"protocol":"TCP"}]}}"#.to_owned(),
        r#"{"spec":{"type":"NodePort"}}"#.to_owned(),
        r#"{"spec":{"sessionAffinity":"ClientIP"}}"#.to_owned(),
        r#"{"spec":{"sessionAffinity":"None"}}"#.to_owned(),
        r#"{"spec":{"type":"ClusterIP"}}"#.to_owned(),
        r#"{"spec":{"ports":[{"port":81,"protocol":"TCP","$patch":"delete"}]}}"#.to_owned(),
        format!(r#"{{"metadata":{{"labels":{{"round":"{round}"}}}}}}"#),
    ];
    for patch in &patches {
        cluster.kubectl(&["patch", "service", "web", "-p", patch])?;
    }
    Ok(())
}

fn scale(cluster: &Cluster, _round: usize) -> anyhow::Result<()> {
    for replicas in ["9", "6"] {
        cluster.kubectl(&["scale", "deployment/web", "--replicas", replicas])?;
        let ready = "jsonpath={.status.replicas} {.status.readyReplicas}";
        let settled = format!("{replicas} {replicas}");
        eventually(cluster, &["get", "deployment", "web", "-o", ready], |count| count == settled)?;
    }
    Ok(())
}

fn roll(cluster: &Cluster, round: usize) -> anyhow::Result<()> {
    cluster.kubectl(&["set", "env", "deployment/web", &format!("ROUND={round}")])?;
    rolled_out(cluster)?;
    // Those that went have ended, so whoever still asked them would know by now.
    eventually(cluster, &["get", "pods", "-l", "app=web", "-o", "name"], |names| names.lines().count() == 6)?;
    Ok(())
}

fn rolled_out(cluster: &Cluster) -> anyhow::Result<()> {
    let status = cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=120s"]);
    status.map(|_| ()).with_context(|| {
        let said = cluster.kubectl(&["describe", "pods", "-l", "app=web"]).unwrap_or_default();
        let lines: Vec<&str> = said.lines().collect();
        format!("{}\n{}", lines[lines.len().saturating_sub(60)..].join("\n"), cluster.log_tail())
    })
}

/// The agents of the clients' node and of another, both at once, while the Deployment is scaled.
fn kill_agents(cluster: &Cluster, _round: usize) -> anyhow::Result<()> {
    let nodes = [HERE, "node-2"];
    let old = nodes.map(|node| agent_of(cluster, node));
    for pid in &old {
        kill(*pid.as_ref().map_err(|error| anyhow::anyhow!("{error:#}"))?, Signal::SIGKILL)?;
    }
    for (node, old) in nodes.iter().zip(old) {
        let old = old?;
        wait_until("the agent is started again", PATIENCE, || {
            Ok(agent_of(cluster, node).ok().filter(|pid| *pid != old))
        })?;
    }
    scale(cluster, 0)
}

/// Cuts a node off: its cable is unplugged and its agent gone. Until its endpoints are taken out, connections to it are lost with their
/// backend; each such loss began before that, and was given up for want of any answer.
fn lose_a_node(cluster: &Cluster, load: &Load) -> anyhow::Result<()> {
    let dead: Vec<String> = addresses(cluster, LOST)?;
    ensure!(!dead.is_empty(), "no backend is on {LOST}");
    let (before, begin) = (load.lost(), Instant::now());
    let agent = agent_of(cluster, LOST)?;
    let netns = File::open(format!("/proc/{agent}/ns/net")).context("open the node's namespace")?;
    within(&netns, || ip(&["link", "set", "eth0", "down"]))??;
    kill(agent, Signal::SIGKILL)?;
    let ready =
        "jsonpath={range .items[*].endpoints[?(@.conditions.ready==true)]}{.addresses[0]}{\"\\n\"}{end}";
    let slices = ["get", "endpointslices", "-l", "kubernetes.io/service-name=web", "-o", ready];
    let left = eventually(cluster, &slices, |list| {
        list.lines().count() > 0 && !list.lines().any(|address| dead.iter().any(|gone| gone == address))
    })?;
    ensure!(left.lines().count() >= 2, "only {left:?} are left");
    let out = Instant::now();
    // Whoever waits for a dead backend gives up; whoever asks from now on gets a live one.
    load.answers("those that are left answer", 2_000)?;
    let lost = load.losses_since(begin);
    let wrong: Vec<_> = lost.iter().filter(|loss| loss.begun > out + Duration::from_secs(1)).collect();
    ensure!(wrong.is_empty(), "lost although its endpoints were out: {wrong:?}");
    eprintln!("{} requests were lost with {} backends of {LOST}", load.lost() - before, dead.len());
    Ok(())
}

fn addresses(cluster: &Cluster, node: &str) -> anyhow::Result<Vec<String>> {
    let field = format!("--field-selector=spec.nodeName={node}");
    let list = ["get", "pods", "-l", "app=web", &field, "-o", "jsonpath={.items[*].status.podIP}"];
    Ok(cluster.kubectl(&list)?.split_whitespace().map(str::to_owned).collect())
}

/// Runs something on a thread that has entered a network namespace.
fn within<T: Send + 'static>(netns: &File, work: impl FnOnce() -> T + Send + 'static) -> anyhow::Result<T> {
    let netns = netns.try_clone()?;
    let thread = std::thread::spawn(move || {
        setns(&netns, CloneFlags::CLONE_NEWNET).context("enter the namespace")?;
        Ok(work())
    });
    thread.join().map_err(|panic| anyhow::anyhow!("{panic:?}"))?
}

/// The namespace of a pod on a node, found among those of the inits of the cluster's sandboxes by its address.
fn pod_namespace(cluster: &Cluster, address: Ipv4Addr) -> anyhow::Result<File> {
    let program = cluster.data_dir().join("bin/weft-init");
    for entry in std::fs::read_dir("/proc")? {
        let folder = entry?.path();
        // Processes come and go while this looks.
        if std::fs::read_link(folder.join("exe")).is_ok_and(|exe| exe == program)
            && let Ok(netns) = File::open(folder.join("ns/net"))
            && within(&netns, move || has(address))??
        {
            return Ok(netns);
        }
    }
    anyhow::bail!("no sandbox has the address {address}")
}

fn has(address: Ipv4Addr) -> anyhow::Result<bool> {
    let mut all = nix::ifaddrs::getifaddrs().context("list addresses")?;
    Ok(all.any(|one| {
        one.address.and_then(|a| a.as_sockaddr_in().map(nix::sys::socket::SockaddrIn::ip)) == Some(address)
    }))
}

/// Those who ask. In the node's namespace sockets are connected to backends by the socket hooks; in the pod's, from a process that is
/// not the pod's, packets are translated at the pod's edge.
struct Load {
    tcp: Vec<(&'static str, Askers)>,
    udp: Vec<(&'static str, Askers)>,
}

impl Load {
    fn start(cluster: &Cluster, to: SocketAddr) -> anyhow::Result<Self> {
        let agent = agent_of(cluster, HERE)?;
        let node = File::open(format!("/proc/{agent}/ns/net")).context("open the node's namespace")?;
        let address = cluster.kubectl(&["get", "pod", "client", "-o", "jsonpath={.status.podIP}"])?;
        let pod = pod_namespace(cluster, address.parse()?)?;
        Ok(Self {
            tcp: vec![
                ("sockets of the node", Askers::start(&node, to, Way::Tcp, CLIENTS)?),
                ("packets of a pod", Askers::start(&pod, to, Way::Tcp, CLIENTS)?),
            ],
            udp: vec![
                ("connected sockets of the node", Askers::start(&node, to, Way::ConnectedUdp, 1)?),
                ("unconnected sockets of the node", Askers::start(&node, to, Way::Udp, 1)?),
                ("datagrams of a pod", Askers::start(&pod, to, Way::ConnectedUdp, 1)?),
            ],
        })
    }

    fn all(&self) -> impl Iterator<Item = &(&'static str, Askers)> {
        self.tcp.iter().chain(&self.udp)
    }

    fn connections(&self) -> u64 {
        self.tcp.iter().map(|(_, askers)| askers.answered()).sum()
    }

    fn datagrams(&self) -> u64 {
        self.udp.iter().map(|(_, askers)| askers.answered()).sum()
    }

    fn lost(&self) -> u64 {
        self.all().map(|(_, askers)| askers.lost()).sum()
    }

    /// What was given up since then.
    fn losses_since(&self, begin: Instant) -> Vec<Loss> {
        let of = |(name, askers): &(&'static str, Askers)| {
            let new = askers.losses().into_iter().filter(|loss| loss.ended >= begin);
            new.map(|loss| Loss { reason: format!("{name}: {}", loss.reason), ..loss }).collect::<Vec<_>>()
        };
        self.all().flat_map(of).collect()
    }

    /// Waits until everybody goes on: so many connections by all, and some datagrams by each.
    fn answers(&self, what: &str, connections: u64) -> anyhow::Result<()> {
        let counts = || self.all().map(|(_, askers)| askers.answered()).collect::<Vec<_>>();
        let (start, begin, before) = (Instant::now(), self.connections(), counts());
        // A run of a million is allowed its time.
        let patience = PATIENCE + Duration::from_millis(connections * 5);
        let waited = wait_until(what, patience, || {
            let each = counts().iter().zip(&before).all(|(now, before)| *now >= before + 20);
            Ok((each && self.connections() >= begin + connections).then_some(()))
        });
        waited.with_context(|| {
            format!("answered {:?} after {before:?}; lost {:?}", counts(), self.losses_since(start))
        })
    }

    fn stop(self) -> anyhow::Result<()> {
        self.tcp.into_iter().chain(self.udp).try_for_each(|(_, askers)| askers.stop())
    }
}
