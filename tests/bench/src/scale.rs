//! N1: a Deployment scaled from nothing to fifty behind a ClusterIP, among thousands of other Services, until all fifty have answered
//! through it.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use weft_tests_harness::wait_until;

use crate::machine::{busy_seconds, own_seconds};
use crate::pods::image;
use crate::report::{Row, Target};
use crate::subject::{Subject, measure};

const BACKENDS: usize = 50;
/// Other Services, unless the environment says another number.
const OTHERS: usize = 10_000;
/// Objects that kubectl creates at a time.
const BATCH: usize = 1_000;
/// Where they are: a pod has variables of every Service of its own namespace, and ten thousand are more than a program can be given.
const ELSEWHERE: &str = "others";
const PATIENCE: Duration = Duration::from_secs(120);
const SHORT: Duration = Duration::from_millis(500);

const WORKLOAD: &str = "apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 0
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
      - {name: main, image: \"weft-probe:1\", command: [weft-probe, serve, 80/tcp]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80}]}
";

/// N1.
pub(crate) fn run(_ids: &[&str], rounds: usize) -> anyhow::Result<Vec<Row>> {
    let others =
        std::env::var("WEFT_BENCH_SERVICES").ok().and_then(|text| text.parse().ok()).unwrap_or(OTHERS);
    let prepare = |cluster: &dyn Subject| {
        cluster.import(&image("probe")?)?;
        cluster.apply(WORKLOAD)?;
        others_too(cluster, others)?;
        let address = cluster.kubectl(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"])?;
        Ok(SocketAddr::new(address.parse()?, 80))
    };
    let sides = measure("n", rounds, prepare, |cluster, &to| {
        let (begin, before, own) = (Instant::now(), busy_seconds()?, own_seconds()?);
        cluster.kubectl(&["scale", "deployment/web", "--replicas", &BACKENDS.to_string()])?;
        let asking = cluster.netns().thread(move || all_answer(to))?;
        asking.join().map_err(|panic| anyhow::anyhow!("{panic:?}"))??;
        let (seconds, busy) = (begin.elapsed().as_secs_f64(), busy_seconds()? - before);
        let measured = [seconds, busy, busy - (own_seconds()? - own)];
        cluster.kubectl(&["scale", "deployment/web", "--replicas", "0"])?;
        wait_until("all pods are gone", PATIENCE, || {
            let left = cluster.kubectl(&["get", "pods", "-l", "app=web", "-o", "name"])?;
            Ok(left.trim().is_empty().then_some(()))
        })?;
        Ok(measured)
    })?;
    let name = |what: &str| {
        format!("N1 scale 0 → {BACKENDS} until all have answered, {others} other Services: {what}")
    };
    Ok(vec![
        sides.row(0, &name("time"), "s", Target::None, Target::AtLeast(15.0)),
        sides.row(1, &name("CPU of the machine"), "s", Target::None, Target::AtLeast(10.0)),
        sides.row(2, &name("the same without the clients'"), "s", Target::None, Target::AtLeast(10.0)),
    ])
}

fn others_too(cluster: &dyn Subject, others: usize) -> anyhow::Result<()> {
    cluster.kubectl(&["create", "namespace", ELSEWHERE])?;
    for first in (0..others).step_by(BATCH) {
        let mut manifest = String::new();
        for number in first..others.min(first + BATCH) {
            let _ = write!(
                manifest,
                "---\napiVersion: v1\nkind: Service\nmetadata: {{name: other-{number}}}\nspec: {{ports: [{{port: 80}}]}}\n"
            );
        }
        let path = cluster.folder().join("others.yaml");
        std::fs::write(&path, manifest)?;
        // To check an object, kubectl reads the API's whole description again, 30 ms of processor time for each.
        let path = path.to_string_lossy();
        cluster.kubectl(&["create", "-n", ELSEWHERE, "--validate=false", "-f", &path])?;
    }
    Ok(())
}

/// Asks until each of the fifty has answered once.
fn all_answer(to: SocketAddr) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut seen = BTreeSet::new();
    while seen.len() < BACKENDS {
        match ask(to) {
            Ok(name) => drop(seen.insert(name)),
            // Refused at once while there is no backend: leave the processor to those that start.
            Err(_not_yet) => std::thread::park_timeout(Duration::from_millis(1)),
        }
        ensure!(Instant::now() < deadline, "only {} backends have answered", seen.len());
    }
    Ok(())
}

fn ask(to: SocketAddr) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, SHORT)?;
    stream.set_read_timeout(Some(SHORT))?;
    stream.write_all(b"GET /hostname HTTP/1.1\r\nHost: n1\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_, name) = answer.split_once("\r\n\r\n").context("half an answer")?;
    Ok(name.trim().to_owned())
}
