//! weft replaced by another version and back, under load: connections stand, none is lost, and containers notice nothing.
//!
//! `WEFT_OTHER_BIN` names the other version. Without it both are the same, which tests what is left of it: stop and start.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use weft_tests_e2e::traffic::Clients;
use weft_tests_e2e::{NODE_PORT, WEB, cluster, eventually, nginx};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::{wait_until, weft_binary};

/// Both nodes: one of them has to hand on to the other's pods.
const NODES: [([u8; 4], u16); 2] = [([10, 44, 0, 2], NODE_PORT), ([10, 44, 0, 3], NODE_PORT)];
const PATIENCE: Duration = Duration::from_secs(15);

#[test]
fn there_and_back_nothing_is_lost() -> anyhow::Result<()> {
    let test = "upgrade::there_and_back_nothing_is_lost";
    let Some(mut cluster) = cluster(test, "upgrade", &["--nodes", "2"])? else { return Ok(()) };
    let own = weft_binary().map_err(anyhow::Error::msg)?;
    let other = std::env::var_os("WEFT_OTHER_BIN").map_or_else(|| own.clone(), PathBuf::from);
    cluster.apply(&nginx("web", 4))?;
    cluster.apply(WEB)?;
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"])?;
    let before = containers(&cluster)?;
    let nodes = NODES.map(SocketAddr::from);
    let mut standing = Vec::new();
    let mut clients = Vec::new();
    for to in nodes {
        let load = Clients::start(&cluster.netns, to, 2, Duration::from_millis(2))?;
        goes_on(&load, "the NodePort answers")?;
        clients.push(load);
        // Several, so that some of them cross to the other node.
        for _ in 0..4 {
            standing.push(Standing::open(&cluster, to)?);
        }
    }
    for binary in [other, own] {
        // As systemd would; `weft down` ends the pods as well.
        let process = cluster.process().context("weft ran")?;
        kill(Pid::from_raw(process.id().try_into()?), Signal::SIGTERM)?;
        ensure!(process.wait()?.success(), "{}", cluster.log_tail());
        go_on(&clients, &mut standing).context("while nothing of weft runs")?;
        let name = binary.display().to_string();
        cluster.use_binary(binary);
        cluster.up().with_context(|| format!("start {name}"))?;
        go_on(&clients, &mut standing).with_context(|| format!("with {name}"))?;
        let ready = ["get", "deployment", "web", "-o", "jsonpath={.status.readyReplicas}"];
        eventually(&cluster, &ready, |count| count == "4")?;
        assert_eq!(containers(&cluster)?, before, "with {name}");
    }
    for clients in clients {
        let tally = clients.stop()?;
        eprintln!("{} requests answered", tally.answered());
        assert_eq!(tally.lost, Vec::<String>::new());
    }
    cluster.purge()
}

fn containers(cluster: &Cluster) -> anyhow::Result<String> {
    let path = "jsonpath={.items[*].status.containerStatuses[*].containerID}";
    cluster.kubectl(&["get", "pods", "-l", "app=web", "-o", path])
}

fn go_on(clients: &[Clients], standing: &mut [Standing]) -> anyhow::Result<()> {
    clients.iter().try_for_each(|clients| goes_on(clients, "the NodePort answers"))?;
    standing.iter_mut().try_for_each(Standing::ask)
}

/// More answers than may have been under way.
fn goes_on(clients: &Clients, what: &str) -> anyhow::Result<()> {
    let answered = clients.answered();
    let waited = wait_until(what, PATIENCE, || Ok((clients.answered() >= answered + 50).then_some(())));
    waited.with_context(|| format!("lost: {:?}", clients.losses()))
}

/// A connection that is kept.
struct Standing(BufReader<TcpStream>);

impl Standing {
    fn open(cluster: &Cluster, to: SocketAddr) -> anyhow::Result<Self> {
        let opened = cluster.netns.thread(move || -> anyhow::Result<TcpStream> {
            let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Ok(stream)
        })?;
        let stream = opened.join().map_err(|_panic| anyhow::anyhow!("the client broke down"))??;
        let mut standing = Self(BufReader::new(stream));
        standing.ask()?;
        Ok(standing)
    }

    /// Asks once more over the same connection.
    fn ask(&mut self) -> anyhow::Result<()> {
        self.0.get_mut().write_all(b"GET /hostname HTTP/1.1\r\nHost: web\r\n\r\n")?;
        let (mut line, mut length) = (String::new(), None);
        loop {
            line.clear();
            ensure!(self.0.read_line(&mut line)? > 0, "a standing connection was closed");
            let line = line.trim_end();
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = Some(value.trim().parse()?);
            }
            if line.is_empty() {
                break;
            }
        }
        let mut body = vec![0; length.context("an answer has a length")?];
        Ok(self.0.read_exact(&mut body)?)
    }
}
