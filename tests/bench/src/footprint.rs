//! F1 idle memory, F2 time to a Ready node and a running pod, F3 size on disk.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::{wait_until, weft_binary};

use crate::machine::resident_mb;
use crate::pods::{Watch, image};
use crate::report::{Row, Target};
use crate::stats::estimate;
use crate::subject::{Sides, Subject, Whose};
use crate::upstream::Upstream;

/// Memory has settled when it changed by less than this in [`SETTLED_FOR`].
const SETTLED_MB: f64 = 0.5;
/// Upstream's seven programs take more than ten times as much, each with a collector of garbage of its own.
const PEER_SETTLED_MB: f64 = 10.0;
const SETTLED_FOR: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(60);

/// F3.
pub(crate) fn size(_: &[&str], _: usize) -> anyhow::Result<Vec<Row>> {
    let binary = weft_binary().map_err(anyhow::Error::msg)?;
    let bytes = fs::metadata(&binary).with_context(|| format!("look at {}", binary.display()))?.len();
    let megabytes = f64::from(u32::try_from(bytes / 1000)?) / 1000.0;
    Ok(vec![Row::figure("F3 size of weft", estimate(&[megabytes]), "MB", Target::AtMost(40.0))])
}

/// F1 and F2: a cluster for each turn, from an empty data directory.
pub(crate) fn start(_: &[&str], rounds: usize) -> anyhow::Result<Vec<Row>> {
    let mut sides = Sides::new();
    let mut halves: Vec<(Whose, Vec<[f64; 3]>)> =
        Whose::turns()?.into_iter().map(|whose| (whose, Vec::new())).collect();
    for round in 0..rounds {
        for (whose, measured) in &mut halves {
            let start = match whose {
                Whose::Weft => weft(),
                Whose::Upstream => upstream(),
            };
            measured.push(start.with_context(|| format!("start {} of {rounds}, {whose:?}", round + 1))?);
        }
    }
    halves.into_iter().for_each(|(whose, measured)| sides.push(whose, measured));
    let name = "F1 idle memory, control plane and node";
    Ok(vec![
        sides.row(0, name, "MB", Target::AtMost(60.0), Target::None),
        sides.row(1, "F2 empty data directory → node Ready", "s", Target::AtMost(1.0), Target::None),
        sides.row(2, "F2 first pod created → Running", "s", Target::None, Target::None),
    ])
}

/// Megabytes at rest, seconds until Ready, seconds until a pod runs.
fn weft() -> anyhow::Result<[f64; 3]> {
    let mut cluster = Cluster::unstarted("f2", &[])?;
    let begin = Instant::now();
    cluster.spawn()?;
    let ready = announced(&cluster)?.duration_since(begin);
    // What weft says of itself is believed only if a client sees the same at its first look.
    let status = cluster.kubectl(&[
        "get",
        "nodes",
        "-o",
        r#"jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}"#,
    ])?;
    ensure!(status == "True", "weft said that it is up, but its node's Ready condition is {status:?}");
    let pid = cluster.process().context("no process")?.id();
    let idle = settled(SETTLED_MB, || resident_mb(pid))?;
    let running = first_pod(&cluster)?;
    cluster.purge()?;
    Ok([idle, ready.as_secs_f64(), running])
}

/// The same of upstream's; a client says that it is Ready.
fn upstream() -> anyhow::Result<[f64; 3]> {
    let mut cluster = Upstream::start("f2")?;
    let idle = settled(PEER_SETTLED_MB, || cluster.resident_mb())?;
    let running = first_pod(&cluster).with_context(|| cluster.said())?;
    let ready = cluster.ready_after().as_secs_f64();
    cluster.end()?;
    Ok([idle, ready, running])
}

/// Seconds from a pod's first sight to its last program's start.
fn first_pod(cluster: &dyn Subject) -> anyhow::Result<f64> {
    cluster.import(&image("busybox")?)?;
    let watch = Watch::start(cluster)?;
    cluster.apply(POD)?;
    let seen = watch.until(PATIENCE, "a pod is Running", |pods| pods.running().count() == 1)?;
    let (first, last) = (seen.first_seen().context("no pod")?, seen.last_running().context("no pod ran")?);
    Ok(last.duration_since(first).as_secs_f64())
}

const POD: &str = "apiVersion: v1
kind: Pod
metadata:
  name: first
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: busybox
    imagePullPolicy: Never
    command: [\"sleep\", \"100000\"]
";

/// When weft said that every node is Ready; looked at every 20 ms.
fn announced(cluster: &Cluster) -> anyhow::Result<Instant> {
    let said = wait_until("weft says that it is up", PATIENCE, || {
        Ok(cluster.says("weft is up:").then(Instant::now))
    });
    said.with_context(|| cluster.log_tail())
}

/// Resident memory once it has not moved by so much for a while.
fn settled(by: f64, resident: impl Fn() -> anyhow::Result<f64>) -> anyhow::Result<f64> {
    let (mut base, mut since) = (resident()?, Instant::now());
    wait_until("the memory has settled", PATIENCE, || {
        let now = resident()?;
        if (now - base).abs() > by {
            (base, since) = (now, Instant::now());
        }
        Ok((since.elapsed() >= SETTLED_FOR).then_some(now))
    })
}
