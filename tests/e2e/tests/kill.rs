//! `kill -9` of weft, again and again: what was acknowledged stays, containers run on, Services answer.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use weft_tests_e2e::traffic::Clients;
use weft_tests_e2e::writes::{WRITERS, Writers, check};
use weft_tests_e2e::{NODE_PORT, WEB, agent_of, cluster, eventually, nginx};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::wait_until;

const KILLS: usize = 20;
const KILLS_OF_SEVERAL: usize = 8;
const NODES: [&str; 3] = ["node-1", "node-2", "node-3"];
const NAMESPACE: &str = "apiVersion: v1
kind: Namespace
metadata: {name: writes}
";

#[test]
fn twenty_times() -> anyhow::Result<()> {
    let Some(mut cluster) = cluster("kill::twenty_times", "kill", &[])? else { return Ok(()) };
    let mut random = seeded()?;
    cluster.apply(&nginx("web", 3))?;
    cluster.apply(NAMESPACE)?;
    cluster.apply(WEB)?;
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"])?;
    let before = containers(&cluster)?;
    assert_eq!(before.len(), 3, "{before:?}");
    let address = cluster.kubectl(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"])?;
    let address = SocketAddr::new(address.parse()?, 80);
    let clients = Clients::start(&cluster.netns, address, 1, Duration::from_millis(2))?;
    wait_until("the ClusterIP answers", Duration::from_secs(10), || {
        Ok((clients.answered() > 10).then_some(()))
    })?;
    let mut expected = BTreeMap::new();
    for round in 0..KILLS {
        let writers = Writers::start(&cluster, round)?;
        some_moment(&mut random)?;
        let process = cluster.process().context("weft runs")?;
        process.kill()?;
        process.wait()?;
        expected.extend(writers.stop()?);
        goes_on(&clients, "the ClusterIP answers while weft is dead").with_context(|| cluster.log_tail())?;
        cluster.up().with_context(|| format!("start after kill {round}"))?;
        let count = check(&cluster, &expected).with_context(|| format!("after kill {round}"))?;
        eprintln!("kill {round}: {count} objects as they were acknowledged");
        assert_eq!(containers(&cluster)?, before, "after kill {round}");
    }
    assert!(expected.len() > KILLS * WRITERS, "only {} objects were written", expected.len());
    let ready = ["get", "deployment", "web", "-o", "jsonpath={.status.readyReplicas}"];
    eventually(&cluster, &ready, |count| count == "3")?;
    assert_eq!(containers(&cluster)?, before, "at the end");
    let tally = clients.stop()?;
    eprintln!("{} requests answered, {} lost", tally.answered(), tally.lost.len());
    assert_eq!(tally.lost, Vec::<String>::new());
    cluster.purge()
}

/// Any of the server and three agents, also several at once. The agents' nodes are reached from outside, by a NodePort.
#[test]
fn any_of_several_processes() -> anyhow::Result<()> {
    let flags = ["--nodes", "3"];
    let Some(mut cluster) = cluster("kill::any_of_several_processes", "kills", &flags)? else {
        return Ok(());
    };
    let mut random = seeded()?;
    cluster.apply(&nginx("web", 3))?;
    cluster.apply(NAMESPACE)?;
    cluster.apply(WEB)?;
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"])?;
    let before = containers(&cluster)?;
    let clients = NODES.map(|node| to_node(&cluster, node));
    let clients = clients.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
    let mut expected = BTreeMap::new();
    for round in 0..KILLS_OF_SEVERAL {
        let writers = Writers::start(&cluster, round)?;
        some_moment(&mut random)?;
        // Bit 0 is the server.
        let victims: u32 = random.random_range(1..16);
        let server = victims & 1 != 0;
        let mut agents = Vec::new();
        for (bit, node) in NODES.into_iter().enumerate().filter(|(bit, _)| victims & (2 << bit) != 0) {
            agents.push((bit, node, agent_of(&cluster, node)?));
        }
        if server {
            let process = cluster.process().context("weft runs")?;
            process.kill()?;
            process.wait()?;
        }
        for (_, _, pid) in &agents {
            kill(*pid, Signal::SIGKILL)?;
        }
        expected.extend(writers.stop()?);
        for (node, clients) in NODES.iter().zip(&clients) {
            goes_on(clients, "the Service answers while processes are dead")
                .with_context(|| format!("through {node}, victims {victims:04b}\n{}", cluster.log_tail()))?;
        }
        if server {
            cluster.up().with_context(|| format!("start after kill {round}"))?;
        }
        for (_, node, old) in &agents {
            restarted(&cluster, node, *old)?;
        }
        let count = check(&cluster, &expected).with_context(|| format!("after kill {round}"))?;
        eprintln!("kill {round} of {victims:04b}: {count} objects as they were acknowledged");
        assert_eq!(containers(&cluster)?, before, "after kill {round} of {victims:04b}");
    }
    let ready = ["get", "deployment", "web", "-o", "jsonpath={.status.readyReplicas}"];
    eventually(&cluster, &ready, |count| count == "3")?;
    for clients in clients {
        assert_eq!(clients.stop()?.lost, Vec::<String>::new());
    }
    cluster.purge()
}

fn to_node(cluster: &Cluster, node: &str) -> anyhow::Result<Clients> {
    let address = "jsonpath={.status.addresses[?(@.type==\"InternalIP\")].address}";
    let address: Ipv4Addr = cluster.kubectl(&["get", "node", node, "-o", address])?.parse()?;
    let to = SocketAddr::from((address, NODE_PORT));
    let clients = Clients::start(&cluster.netns, to, 1, Duration::from_millis(2))?;
    goes_on(&clients, "the NodePort answers")?;
    Ok(clients)
}

/// The agent of a node is another process than before.
fn restarted(cluster: &Cluster, node: &str, old: Pid) -> anyhow::Result<()> {
    wait_until("the agent is started again", Duration::from_secs(40), || {
        Ok(agent_of(cluster, node).ok().filter(|pid| *pid != old))
    })?;
    Ok(())
}

/// Twenty more answers.
fn goes_on(clients: &Clients, what: &str) -> anyhow::Result<()> {
    let answered = clients.answered();
    let waited =
        wait_until(what, Duration::from_secs(15), || Ok((clients.answered() >= answered + 20).then_some(())));
    waited.with_context(|| format!("after {answered} answers; lost: {:?}", clients.losses()))
}

fn seeded() -> anyhow::Result<StdRng> {
    let seed =
        std::env::var("WEFT_SEED").ok().map_or_else(|| Ok(rand::random()), |seed| seed.parse::<u64>())?;
    eprintln!("WEFT_SEED={seed}");
    Ok(StdRng::seed_from_u64(seed))
}

fn some_moment(random: &mut StdRng) -> anyhow::Result<()> {
    let moment = Instant::now() + Duration::from_millis(random.random_range(0..1500));
    wait_until("the moment comes", Duration::from_secs(5), || Ok((Instant::now() >= moment).then_some(())))
}

/// Each container's pod, address, id, restarts and start as the API tells, and its processes with their start in the kernel's ticks.
fn containers(cluster: &Cluster) -> anyhow::Result<BTreeMap<String, Vec<String>>> {
    let columns = "jsonpath={range .items[*]}{.metadata.name} {.status.podIP} {.status.containerStatuses[0].containerID} \
                   {.status.containerStatuses[0].restartCount} {.status.containerStatuses[0].state.running.startedAt}\
                   {\"\\n\"}{end}";
    let rows = cluster.kubectl(&["get", "pods", "-l", "app=web", "-o", columns])?;
    let mut containers = BTreeMap::new();
    for row in rows.lines() {
        let id = row.split(' ').find_map(|word| word.strip_prefix("weft://")).context("a container's id")?;
        let mut facts = vec![row.to_owned()];
        facts.extend(processes(id)?);
        assert_eq!(facts.len(), 3, "nginx and its worker: {facts:?}");
        containers.insert(id.to_owned(), facts);
    }
    Ok(containers)
}

/// The processes in a container's cgroup, which is named after its id: number and start.
fn processes(container: &str) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        // Any other process may end between two looks.
        let Ok(cgroups) = std::fs::read_to_string(path.join("cgroup")) else { continue };
        if !cgroups.contains(container) {
            continue;
        }
        let stat = std::fs::read_to_string(path.join("stat"))?;
        // The name in brackets may hold spaces; the start is the 20th word behind it.
        let start =
            stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(19)).context("a start time")?;
        found.push(format!("{} {start}", path.display()));
    }
    found.sort();
    Ok(found)
}
