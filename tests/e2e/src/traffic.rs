//! Requests that a test lets run beside it: who answered, and which got no answer.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::netns::Netns;

const TIMEOUT: Duration = Duration::from_secs(10);

/// What became of requests.
#[derive(Debug, Default)]
pub struct Tally {
    /// Answers by the name of the pod that gave them.
    pub answers: BTreeMap<String, u64>,
    /// Why requests got no answer.
    pub lost: Vec<String>,
}

impl Tally {
    /// Takes in what another client saw.
    pub fn add(&mut self, other: Self) {
        for (name, count) in other.answers {
            *self.answers.entry(name).or_default() += count;
        }
        self.lost.extend(other.lost);
    }

    /// How many were answered.
    pub fn answered(&self) -> u64 {
        self.answers.values().sum()
    }

    fn record(&mut self, outcome: anyhow::Result<String>) {
        match outcome {
            Ok(name) => *self.answers.entry(name).or_default() += 1,
            Err(error) => self.lost.push(format!("{error:#}")),
        }
    }
}

/// Clients in a network namespace that ask `/hostname` one connection after the other, until stopped.
#[derive(Debug)]
pub struct Clients {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    losses: Arc<Mutex<Vec<String>>>,
    threads: Vec<JoinHandle<anyhow::Result<Tally>>>,
}

impl Clients {
    /// Starts them. Each rests for `pause` between two requests.
    ///
    /// # Errors
    /// If the namespace is gone.
    pub fn start(netns: &Netns, to: SocketAddr, clients: usize, pause: Duration) -> anyhow::Result<Self> {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let losses = Arc::new(Mutex::new(Vec::new()));
        let mut threads = Vec::new();
        for _ in 0..clients {
            let (stop, answered, losses) = (Arc::clone(&stop), Arc::clone(&answered), Arc::clone(&losses));
            threads.push(netns.thread(move || {
                let mut tally = Tally::default();
                while !stop.load(Ordering::Relaxed) {
                    let outcome = ask(to);
                    if let (Err(error), Ok(mut losses)) = (&outcome, losses.lock()) {
                        losses.push(format!("{error:#}"));
                    }
                    answered.fetch_add(u64::from(outcome.is_ok()), Ordering::Relaxed);
                    tally.record(outcome);
                    std::thread::park_timeout(pause);
                }
                Ok(tally)
            })?);
        }
        Ok(Self { stop, answered, losses, threads })
    }

    /// Why requests were lost so far.
    pub fn losses(&self) -> Vec<String> {
        self.losses.lock().map(|losses| losses.clone()).unwrap_or_default()
    }

    /// Answers so far.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Ends them; each finishes its last request.
    ///
    /// # Errors
    /// If one couldn't run.
    pub fn stop(self) -> anyhow::Result<Tally> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Tally::default();
        for thread in self.threads {
            all.add(thread.join().map_err(|panic| anyhow::anyhow!("a client panicked: {panic:?}"))??);
        }
        Ok(all)
    }
}

/// Asks which pod answers.
fn ask(to: SocketAddr) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, TIMEOUT).context("connect")?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(b"GET /hostname HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n").context("send")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("receive")?;
    let Some((head, body)) = answer.split_once("\r\n\r\n") else { bail!("half an answer: {answer:?}") };
    ensure!(head.starts_with("HTTP/1.1 200 "), "{head}");
    Ok(body.trim_end().to_owned())
}

/// Where a client in a pod looks whether it shall stop.
const STOP: &str = "/tmp/stop";

/// Clients in a pod, each a `wget` after the other, until stopped.
#[derive(Debug)]
pub struct PodClients {
    pod: String,
    processes: Vec<Child>,
    answered: Arc<AtomicU64>,
    readers: Vec<JoinHandle<anyhow::Result<Tally>>>,
}

impl PodClients {
    /// Starts them through `kubectl exec`.
    ///
    /// # Errors
    /// If kubectl can't be started.
    pub fn start(cluster: &Cluster, pod: &str, to: SocketAddr, clients: usize) -> anyhow::Result<Self> {
        let script = format!(
            "while [ ! -e {STOP} ]; do wget -qO- http://{to}/hostname 2>&1 || echo \"LOST by wget: $?\"; done"
        );
        let answered = Arc::new(AtomicU64::new(0));
        let (mut processes, mut readers) = (Vec::new(), Vec::new());
        for _ in 0..clients {
            let mut command = cluster.kubectl_command(&["exec", pod, "--", "sh", "-c", &script])?;
            let mut child =
                command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("run kubectl")?;
            let output = child.stdout.take().context("standard output is a pipe")?;
            let answered = Arc::clone(&answered);
            readers.push(std::thread::spawn(move || {
                let mut tally = Tally::default();
                for line in std::io::BufRead::lines(std::io::BufReader::new(output)) {
                    let line = line?;
                    // A pod's name has neither a space nor a colon; what wget and the loop complain with has both.
                    let outcome =
                        if line.contains([' ', ':']) { Err(anyhow::anyhow!(line)) } else { Ok(line) };
                    answered.fetch_add(u64::from(outcome.is_ok()), Ordering::Relaxed);
                    tally.record(outcome);
                }
                Ok(tally)
            }));
            processes.push(child);
        }
        Ok(Self { pod: pod.to_owned(), processes, answered, readers })
    }

    /// Answers so far.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Ends them; each finishes its last request.
    ///
    /// # Errors
    /// If one couldn't run.
    pub fn stop(self, cluster: &Cluster) -> anyhow::Result<Tally> {
        cluster.kubectl(&["exec", &self.pod, "--", "touch", STOP])?;
        let mut all = Tally::default();
        for reader in self.readers {
            all.add(reader.join().map_err(|panic| anyhow::anyhow!("a reader panicked: {panic:?}"))??);
        }
        for mut process in self.processes {
            let status = process.wait()?;
            ensure!(status.success(), "kubectl exec: {status}");
        }
        Ok(all)
    }
}
