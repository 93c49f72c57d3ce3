//! Fifty replicas behind a Service: no request is lost, whoever asks, and whatever is scaled meanwhile.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use weft_tests_e2e::traffic::{Clients, PodClients, Tally};
use weft_tests_e2e::{WEB, cluster, eventually, nginx, sleeper};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::netns::{Netns, ip};
use weft_tests_harness::wait_until;

const REPLICAS: usize = 50;
const REQUESTS: u64 = 10_000;
/// The machine's address on the cable to the other machine, which is a namespace too.
const MACHINE: &str = "192.0.2.1";
const OUTSIDE: &str = "192.0.2.2";

#[test]
fn fifty_replicas() -> anyhow::Result<()> {
    let Some(mut cluster) = cluster("load::fifty_replicas", "load", &[])? else { return Ok(()) };
    let outside = outside(&cluster)?;
    cluster.apply(&nginx("web", 50))?;
    cluster.apply(WEB)?;
    cluster.apply(&sleeper("client", None))?;
    cluster.kubectl(&["wait", "pod/client", "--for=condition=Ready", "--timeout=60s"])?;
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"])?;
    let spec =
        |path: &str| cluster.kubectl(&["get", "service", "web", "-o", &format!("jsonpath={{.spec.{path}}}")]);
    let service = SocketAddr::new(spec("clusterIP")?.parse()?, 80);
    let node_port = SocketAddr::new(MACHINE.parse()?, spec("ports[0].nodePort")?.parse()?);
    let load = Load::start(&cluster, &outside, service, node_port)?;
    load.wait(REQUESTS)?;
    let pods = ["get", "pods", "-l", "app=web", "-o", "jsonpath={.items[*].metadata.name}"];
    let first = cluster.kubectl(&pods)?;
    for replicas in ["10", "50"] {
        cluster.kubectl(&["scale", "deployment/web", "--replicas", replicas])?;
        let settled = |count: &str| count == format!("{replicas} {replicas}");
        let ready = "jsonpath={.status.replicas} {.status.readyReplicas}";
        eventually(&cluster, &["get", "deployment", "web", "-o", ready], settled)?;
        let running = |names: &str| names.split_whitespace().count().to_string() == replicas;
        eventually(&cluster, &pods, running)?;
    }
    let second = cluster.kubectl(&pods)?;
    load.wait(1_000)?;
    for (from, tally) in load.stop(&cluster)? {
        eprintln!("{from}: {} answers, {} lost", tally.answered(), tally.lost.len());
        assert_eq!(tally.lost, Vec::<String>::new(), "lost, asked from {from}");
        assert!(tally.answered() >= REQUESTS, "{from}: {}", tally.answered());
        for pod in first.split_whitespace().chain(second.split_whitespace()) {
            assert!(
                tally.answers.contains_key(pod),
                "{pod} answered nothing from {from}: {:?}",
                tally.answers
            );
        }
        assert!(tally.answers.len() >= REPLICAS, "{:?}", tally.answers);
    }
    cluster.purge()
}

/// A machine beside the cluster's, joined to it by a cable.
fn outside(cluster: &Cluster) -> anyhow::Result<Netns> {
    let outside = Netns::new("out")?;
    let machine = cluster.netns.name();
    ip(&[
        "-n",
        machine,
        "link",
        "add",
        "cable",
        "type",
        "veth",
        "peer",
        "name",
        "cable",
        "netns",
        outside.name(),
    ])?;
    for (name, address) in [(machine, MACHINE), (outside.name(), OUTSIDE)] {
        ip(&["-n", name, "address", "add", &format!("{address}/24"), "dev", "cable"])?;
        ip(&["-n", name, "link", "set", "cable", "up"])?;
    }
    Ok(outside)
}

/// Those who ask: a pod, the machine, and another machine.
struct Load {
    pod: PodClients,
    machine: Clients,
    outside: Clients,
}

impl Load {
    fn start(
        cluster: &Cluster,
        outside: &Netns,
        service: SocketAddr,
        node_port: SocketAddr,
    ) -> anyhow::Result<Self> {
        let pause = Duration::from_millis(1);
        Ok(Self {
            pod: PodClients::start(cluster, "client", service, 2)?,
            machine: Clients::start(&cluster.netns, service, 2, pause)?,
            outside: Clients::start(outside, node_port, 2, pause)?,
        })
    }

    /// Waits until each has got so many answers from now on.
    fn wait(&self, answers: u64) -> anyhow::Result<()> {
        let counts = || [self.pod.answered(), self.machine.answered(), self.outside.answered()];
        let wanted = counts().map(|count| count + answers);
        let waited = wait_until("all are answered", Duration::from_secs(100), || {
            Ok(counts().iter().zip(wanted).all(|(count, wanted)| *count >= wanted).then_some(()))
        });
        waited.with_context(|| format!("answered: {:?}", counts()))
    }

    fn stop(self, cluster: &Cluster) -> anyhow::Result<[(&'static str, Tally); 3]> {
        Ok([
            ("the pod", self.pod.stop(cluster)?),
            ("the machine", self.machine.stop()?),
            ("another machine", self.outside.stop()?),
        ])
    }
}
