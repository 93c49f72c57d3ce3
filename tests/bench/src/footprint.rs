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

/// Memory has settled when it changed by less than this in [`SETTLED_FOR`].
const SETTLED_MB: f64 = 0.5;
const SETTLED_FOR: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(60);

/// F3.
pub(crate) fn size(_: &[&str], _: usize) -> anyhow::Result<Vec<Row>> {
    let binary = weft_binary().map_err(anyhow::Error::msg)?;
    let bytes = fs::metadata(&binary).with_context(|| format!("look at {}", binary.display()))?.len();
    let megabytes = f64::from(u32::try_from(bytes / 1000)?) / 1000.0;
    Ok(vec![Row::figure("F3 size of weft", estimate(&[megabytes]), "MB", Target::AtMost(40.0))])
}

/// F1 and F2: as many clusters in a row as there are rounds, each from an empty data directory.
pub(crate) fn start(_: &[&str], rounds: usize) -> anyhow::Result<Vec<Row>> {
    let mut samples = Samples::default();
    for round in 0..rounds {
        one_start(&mut samples).with_context(|| format!("start {} of {rounds}", round + 1))?;
    }
    Ok(vec![
        Row::figure(
            "F1 idle memory, control plane and node",
            estimate(&samples.idle_mb),
            "MB",
            Target::AtMost(60.0),
        ),
        Row::figure(
            "F2 empty data directory → node Ready",
            estimate(&samples.ready),
            "s",
            Target::AtMost(1.0),
        ),
        Row::figure("F2 first pod created → Running", estimate(&samples.running), "s", Target::None),
    ])
}

#[derive(Default)]
struct Samples {
    ready: Vec<f64>,
    running: Vec<f64>,
    idle_mb: Vec<f64>,
}

fn one_start(samples: &mut Samples) -> anyhow::Result<()> {
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
    let idle = settled(pid)?;
    cluster.import(&image("busybox")?)?;
    let watch = Watch::start(&cluster)?;
    cluster.apply(POD)?;
    let seen = watch.until(PATIENCE, "a pod is Running", |pods| pods.running().count() == 1)?;
    let running =
        seen.last_running().context("no pod ran")?.duration_since(seen.first_seen().context("no pod")?);
    samples.ready.push(ready.as_secs_f64());
    samples.idle_mb.push(idle);
    samples.running.push(running.as_secs_f64());
    cluster.purge()
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
    command: [\"sleep\", \"100000\"]
";

/// When weft said that every node is Ready; looked at every 20 ms.
fn announced(cluster: &Cluster) -> anyhow::Result<Instant> {
    let said = wait_until("weft says that it is up", PATIENCE, || {
        Ok(cluster.says("weft is up:").then(Instant::now))
    });
    said.with_context(|| cluster.log_tail())
}

/// Resident memory once nothing moves any more.
fn settled(pid: u32) -> anyhow::Result<f64> {
    let (mut base, mut since) = (resident_mb(pid)?, Instant::now());
    wait_until("the memory has settled", PATIENCE, || {
        let now = resident_mb(pid)?;
        if (now - base).abs() > SETTLED_MB {
            (base, since) = (now, Instant::now());
        }
        Ok((since.elapsed() >= SETTLED_FOR).then_some(now))
    })
}
