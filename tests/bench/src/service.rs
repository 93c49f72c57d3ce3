//! D1 and D2: connections through a ClusterIP, against direct ones and against iptables rules of kube-proxy's shape.
//!
//! One node, four pods, one client process in the node's network namespace. The three sides share pods, servers and client; they differ in
//! the address that the client connects to. iptables' rules are loaded only while it is iptables' turn: a weft node has none.

pub(crate) mod iptables;
pub(crate) mod nftables;
mod sizes;
pub(crate) mod traffic;

pub(crate) use sizes::run as run_sizes;

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::netns::ip;
use weft_tests_harness::wait_until;

use crate::machine::{busy_seconds, own_seconds};
use crate::pods::image;
use crate::report::{Row, Target};
use crate::stats::{Turns, as_f64, compare, there_and_back};
use traffic::{Backends, Client, Load};

const BACKENDS: usize = 4;
const PORT: u16 = 80;
const TARGET_PORT: u16 = 8080;
const PATIENCE: Duration = Duration::from_secs(60);
/// An address that weft knows nothing of, for iptables to serve.
const PEER_VIP: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 10);
/// Connections of one turn of D1, one after the other.
const SERIAL: usize = 1000;
/// Clients of D2, and connections of each in one turn.
const CLIENTS: usize = 64;
const EACH: usize = 200;
/// Processors that may be busy with something else before the whole machine's time says nothing of a benchmark.
pub(crate) const QUIET: f64 = 0.1;
/// How long the machine is watched for what else runs on it.
const IDLE_WATCH: Duration = Duration::from_secs(3);

/// D1 and D2.
pub(crate) fn run(ids: &[&str], rounds: usize) -> anyhow::Result<Vec<Row>> {
    let mut cluster = Cluster::start("d", &[])?;
    let mut rows = Vec::new();
    {
        let stage = Stage::build(&cluster)?;
        if ids.contains(&"D1") {
            rows.extend(stage.latency(rounds)?);
        }
        if ids.contains(&"D2") {
            rows.extend(stage.throughput(rounds)?);
        }
    }
    cluster.purge()?;
    Ok(rows)
}

/// What a client connects to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Direct,
    Service,
    Iptables,
}

const SIDES: [Side; 3] = [Side::Direct, Side::Service, Side::Iptables];

struct Stage<'a> {
    cluster: &'a Cluster,
    client: Client,
    pods: Vec<Ipv4Addr>,
    vip: Ipv4Addr,
    /// Kept for its threads.
    _backends: Backends,
}

const MANIFEST: &str = "apiVersion: apps/v1
kind: Deployment
metadata:
  name: backend
spec:
  replicas: 4
  selector:
    matchLabels:
      app: backend
  template:
    metadata:
      labels:
        app: backend
    spec:
      terminationGracePeriodSeconds: 0
      containers:
      - name: main
        image: busybox
        command: [\"sleep\", \"100000\"]
---
apiVersion: v1
kind: Service
metadata:
  name: backend
spec:
  selector:
    app: backend
  ports:
  - port: 80
    targetPort: 8080
";

impl<'a> Stage<'a> {
    /// Pods whose servers are threads of this process, a Service before them, and a route to the address that iptables serves.
    fn build(cluster: &'a Cluster) -> anyhow::Result<Self> {
        cluster.import(&image("busybox")?)?;
        cluster.apply(MANIFEST)?;
        cluster.kubectl(&["rollout", "status", "deployment/backend", "--timeout=60s"])?;
        let list = cluster.kubectl(&["get", "pods", "-o", "jsonpath={.items[*].status.podIP}"])?;
        let pods: Vec<Ipv4Addr> = list.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        ensure!(pods.len() == BACKENDS, "expected {BACKENDS} pods with addresses, got {list:?}");
        let vip =
            cluster.kubectl(&["get", "service", "backend", "-o", "jsonpath={.spec.clusterIP}"])?.parse()?;
        let backends = Backends::start(&cluster.hostname(), &pods, TARGET_PORT)?;
        let bridge = "weft0";
        ip(&["-n", cluster.netns.name(), "route", "replace", &format!("{PEER_VIP}/32"), "dev", bridge])?;
        let client = Client::new(&cluster.netns.path())?;
        let stage = Self { cluster, client, pods, vip, _backends: backends };
        for side in SIDES {
            stage.check(side).with_context(|| format!("{side:?} doesn't carry connections"))?;
        }
        Ok(stage)
    }

    fn addresses(&self, side: Side) -> Vec<SocketAddrV4> {
        match side {
            Side::Direct => self.pods.iter().map(|pod| SocketAddrV4::new(*pod, TARGET_PORT)).collect(),
            Side::Service => vec![SocketAddrV4::new(self.vip, PORT)],
            Side::Iptables => vec![SocketAddrV4::new(PEER_VIP, PORT)],
        }
    }

    /// Every backend answers, and nothing else does.
    fn check(&self, side: Side) -> anyhow::Result<()> {
        let _rules = self.rules(side)?;
        wait_until("every backend has answered", PATIENCE, || {
            let seen = self.client.run(&Load { addresses: self.addresses(side), clients: 1, each: 100 })?;
            self.all_answered(&seen.backends).map(Some)
        })
    }

    fn all_answered(&self, seen: &std::collections::BTreeMap<Ipv4Addr, usize>) -> anyhow::Result<()> {
        let right = self.pods.iter().all(|pod| seen.contains_key(pod)) && seen.len() == self.pods.len();
        ensure!(right, "the pods are {:?}; those that answered {seen:?}", self.pods);
        Ok(())
    }

    fn rules(&self, side: Side) -> anyhow::Result<Option<iptables::Rules<'a>>> {
        let peer = SocketAddrV4::new(PEER_VIP, PORT);
        let load = || iptables::Rules::load(&self.cluster.netns, peer, &self.pods, TARGET_PORT);
        (side == Side::Iptables).then(load).transpose()
    }

    /// One turn of one side; every connection must have been answered, by every backend.
    fn turn(&self, side: Side, clients: usize, each: usize) -> anyhow::Result<traffic::Outcome> {
        let _rules = self.rules(side)?;
        let outcome = self.client.run(&Load { addresses: self.addresses(side), clients, each })?;
        self.all_answered(&outcome.backends)?;
        let answered: usize = outcome.backends.values().sum();
        ensure!(
            answered == clients * each,
            "{side:?}: {answered} of {} connections were answered",
            clients * each
        );
        Ok(outcome)
    }

    /// Takes turns for all rounds; `measure` yields N figures of one turn. Answers figures by figure and side.
    fn rounds<const N: usize>(
        &self,
        rounds: usize,
        measure: impl Fn(Side) -> anyhow::Result<[f64; N]>,
    ) -> anyhow::Result<[[Vec<Turns>; 3]; N]> {
        let mut all: [[Vec<Turns>; 3]; N] = std::array::from_fn(|_| Default::default());
        for _ in 0..rounds {
            let mut turns: [Vec<[f64; N]>; 3] = Default::default();
            for side in there_and_back(SIDES.len()) {
                turns[side].push(measure(SIDES[side])?);
            }
            for (figure, sides) in all.iter_mut().enumerate() {
                for (side, kept) in sides.iter_mut().enumerate() {
                    kept.push(Turns(turns[side][0][figure], turns[side][1][figure]));
                }
            }
        }
        Ok(all)
    }

    fn latency(&self, rounds: usize) -> anyhow::Result<Vec<Row>> {
        let [p50, p99] = self.rounds(rounds, |side| {
            let micros = self.turn(side, 1, SERIAL)?.micros;
            Ok([crate::stats::quantile(&micros, 0.5), crate::stats::quantile(&micros, 0.99)])
        })?;
        let row = |name, turns: &[Vec<Turns>; 3], (peer, floor): (&str, usize), target| {
            Row::compared(name, peer, "µs", &compare(&turns[1], &turns[floor]), target)
        };
        Ok(vec![
            row("D1 connect → first byte p50", &p50, ("direct", 0), Target::AtMost(1.05)),
            row("D1 connect → first byte p99", &p99, ("direct", 0), Target::AtMost(1.05)),
            row("D1 connect → first byte p50", &p50, ("iptables", 2), Target::None),
            row("D1 connect → first byte p99", &p99, ("iptables", 2), Target::None),
        ])
    }

    fn throughput(&self, rounds: usize) -> anyhow::Result<Vec<Row>> {
        let elsewhere = idle_load()?;
        let [machine, own] = self.rounds(rounds, |side| {
            let (busy, mine, begin) = (busy_seconds()?, own_seconds()?, Instant::now());
            self.turn(side, CLIENTS, EACH)?;
            let idle = elsewhere * begin.elapsed().as_secs_f64();
            let connections = as_f64(CLIENTS * EACH);
            Ok([connections / (busy_seconds()? - busy - idle), connections / (own_seconds()? - mine)])
        })?;
        let row = |name, turns: &[Vec<Turns>; 3], (peer, floor): (&str, usize), target| {
            Row::compared(name, peer, "/CPU-s", &compare(&turns[1], &turns[floor]), target)
        };
        let (all, process) =
            ("D2 connections, whole machine's CPU", "D2 connections, CPU of client and servers");
        let mut rows = vec![
            row(process, &own, ("iptables", 2), Target::AtLeast(1.0)),
            row(process, &own, ("direct", 0), Target::None),
        ];
        if elsewhere <= QUIET {
            rows.push(row(all, &machine, ("iptables", 2), Target::AtLeast(1.0)));
            rows.push(row(all, &machine, ("direct", 0), Target::None));
        } else {
            eprintln!(
                "D2: other work took {elsewhere:.2} processors, so no row of the whole machine's CPU: it would say nothing"
            );
        }
        Ok(rows)
    }
}

/// How many processors are busy with something else.
pub(crate) fn idle_load() -> anyhow::Result<f64> {
    let (busy, begin) = (busy_seconds()?, Instant::now());
    wait_until("the machine has been watched", IDLE_WATCH * 2, || {
        Ok((begin.elapsed() >= IDLE_WATCH).then_some(()))
    })?;
    Ok((busy_seconds()? - busy) / begin.elapsed().as_secs_f64())
}
