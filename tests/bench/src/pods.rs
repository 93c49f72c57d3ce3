//! K1: fifty pods at once, from bound to Running as a watch sees it.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use weft_tests_harness::{wait_until, workspace};

use crate::machine::busy_seconds;
use crate::report::{Row, Target};
use crate::subject::{Subject, measure};

const PODS: usize = 50;
const PATIENCE: Duration = Duration::from_secs(120);
/// What a watch prints of a pod at each change.
const COLUMNS: &str = r#"jsonpath={.metadata.name} {.status.phase} {.spec.nodeName}{"\n"}"#;

/// K1.
pub(crate) fn run(_: &[&str], rounds: usize) -> anyhow::Result<Vec<Row>> {
    let prepare = |cluster: &dyn Subject| {
        cluster.import(&image("nginx")?)?;
        cluster.apply(&nginx("k1", 0))
    };
    let sides = measure("k1", rounds, prepare, |cluster, ()| {
        let (seconds, busy) = scale_up(cluster)?;
        cluster.kubectl(&["scale", "deployment/k1", "--replicas=0"])?;
        wait_until("every pod is gone", PATIENCE, || {
            Ok(cluster.kubectl(&["get", "pods", "-o", "name"])?.is_empty().then_some(()))
        })?;
        Ok([seconds, busy])
    })?;
    let name = |what: &str| format!("K1 {PODS} nginx pods, first bound → last Running: {what}");
    Ok(vec![
        sides.row(0, &name("time"), "s", Target::AtMost(3.5), Target::AtLeast(10.0)),
        sides.row(1, &name("CPU of the machine, from the scaling on"), "s", Target::None, Target::None),
    ])
}

/// Seconds from the first bound to the last Running, and of the machine's processors from the scaling on.
fn scale_up(cluster: &dyn Subject) -> anyhow::Result<(f64, f64)> {
    let watch = Watch::start(cluster)?;
    let before = busy_seconds()?;
    cluster.kubectl(&["scale", "deployment/k1", &format!("--replicas={PODS}")])?;
    let seen = watch.until(PATIENCE, "every pod is Running", |pods| pods.running().count() == PODS)?;
    let busy = busy_seconds()? - before;
    let listed = cluster.kubectl(&["get", "pods", "--field-selector=status.phase=Running", "-o", "name"])?;
    ensure!(
        listed.lines().count() == PODS,
        "a list doesn't show the {PODS} Running pods that the watch showed"
    );
    let (first, last) = (seen.first_bound().context("none bound")?, seen.last_running().context("none ran")?);
    Ok((last.duration_since(first).as_secs_f64(), busy))
}

/// A Deployment of nginx.
pub(crate) fn nginx(name: &str, replicas: usize) -> String {
    format!(
        "apiVersion: apps/v1
kind: Deployment
metadata:
  name: {name}
spec:
  replicas: {replicas}
  selector:
    matchLabels:
      app: {name}
  template:
    metadata:
      labels:
        app: {name}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: nginx
        image: nginx:1.22
"
    )
}

/// The archive of a sample image.
pub(crate) fn image(name: &str) -> anyhow::Result<PathBuf> {
    let folder = std::env::var_os("WEFT_IMAGES")
        .map_or_else(|| workspace().join("target").join("images"), PathBuf::from);
    let path = folder.join(format!("{name}.tar"));
    ensure!(path.is_file(), "no {}; run `cargo xtask images`", path.display());
    Ok(path)
}

/// When a pod was first seen in each state.
#[derive(Clone, Copy, Debug, Default)]
struct Pod {
    seen: Option<Instant>,
    bound: Option<Instant>,
    running: Option<Instant>,
}

/// All pods that a watch has seen.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pods(HashMap<String, Pod>);

impl Pods {
    fn note(&mut self, line: &str, now: Instant) {
        let mut words = line.split_whitespace();
        let Some(name) = words.next() else { return };
        let pod = self.0.entry(name.to_owned()).or_default();
        pod.seen.get_or_insert(now);
        if words.next() == Some("Running") {
            pod.running.get_or_insert(now);
        }
        if words.next().is_some() {
            pod.bound.get_or_insert(now);
        }
    }

    /// When each of the pods that run was first seen to.
    pub(crate) fn running(&self) -> impl Iterator<Item = Instant> {
        self.0.values().filter_map(|pod| pod.running)
    }

    /// When the last of them ran.
    pub(crate) fn last_running(&self) -> Option<Instant> {
        self.running().max()
    }

    /// When the first pod was seen at all.
    pub(crate) fn first_seen(&self) -> Option<Instant> {
        self.0.values().filter_map(|pod| pod.seen).min()
    }

    fn first_bound(&self) -> Option<Instant> {
        self.0.values().filter_map(|pod| pod.bound).min()
    }
}

/// `kubectl get pods --watch-only`, every line with the time of its arrival.
pub(crate) struct Watch {
    kubectl: Child,
    pods: Arc<Mutex<Pods>>,
}

impl Watch {
    /// Starts it and waits until the API server has it.
    pub(crate) fn start(cluster: &dyn Subject) -> anyhow::Result<Self> {
        let mut command = cluster.kubectl_command(&["get", "pods", "--watch-only", "-v=6", "-o", COLUMNS])?;
        let mut kubectl =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let (out, log) =
            (kubectl.stdout.take().context("no output")?, kubectl.stderr.take().context("no log")?);
        let pods = Arc::new(Mutex::new(Pods::default()));
        let watch = Self { kubectl, pods: Arc::clone(&pods) };
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                pods.lock().unwrap_or_else(PoisonError::into_inner).note(&line, Instant::now());
            }
        });
        // At this verbosity kubectl logs a request when its headers have come back.
        let mut log = BufReader::new(log).lines().map_while(Result::ok);
        let open = log.find(|line| line.contains("watch=true"));
        ensure!(open.is_some(), "kubectl ended before it watched");
        std::thread::spawn(move || log.for_each(drop));
        Ok(watch)
    }

    /// Waits until the pods are as `accept` wants them; answers them.
    pub(crate) fn until(
        &self,
        patience: Duration,
        what: &str,
        accept: impl Fn(&Pods) -> bool,
    ) -> anyhow::Result<Pods> {
        wait_until(what, patience, || {
            let pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
            Ok(accept(&pods).then(|| pods.clone()))
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let ended = self.kubectl.kill().and_then(|()| self.kubectl.wait());
        if let Err(error) = ended {
            eprintln!("cannot end a kubectl: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_keeps_the_first_time_of_each_state() {
        let begin = Instant::now();
        let at = |millis| begin + Duration::from_millis(millis);
        let mut pods = Pods::default();
        for (line, millis) in [
            ("a Pending ", 1),
            ("b Pending n1", 2),
            ("a Pending n1", 3),
            ("a Running n1", 4),
            ("b Running n1", 5),
            ("a Running n1", 9),
        ] {
            pods.note(line, at(millis));
        }
        assert_eq!(pods.first_seen(), Some(at(1)));
        assert_eq!(pods.first_bound(), Some(at(2)));
        assert_eq!(pods.last_running(), Some(at(5)));
        assert_eq!(pods.running().count(), 2);
    }
}
