//! Questions from a place in the network, and what became of them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, ensure};
use tokio::io::AsyncWriteExt as _;
use weft_tests_harness::netns::command_in;

use crate::site::Site;

/// Where a question is asked from.
#[derive(Clone, Debug)]
pub enum Place {
    /// A pod with the probe's image, by its name.
    Pod(String),
    /// A network namespace, by a program that is in no pod's cgroup.
    Netns(PathBuf),
}

/// How a question is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// HTTP over TCP.
    Tcp,
    /// A datagram from a connected socket.
    Udp,
    /// A datagram from a socket that isn't connected; the answer must come from the address that was asked.
    SendTo,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::SendTo];

    fn word(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::SendTo => "sendto",
        }
    }
}

/// A question.
#[derive(Clone, Debug)]
pub struct Request {
    /// How.
    pub way: Way,
    /// Whom.
    pub to: SocketAddr,
    /// How often, one after the other.
    pub count: u32,
    /// How long an answer may take before the question counts as dropped.
    pub timeout_ms: u32,
}

impl Request {
    /// One question with two seconds' patience.
    #[must_use]
    pub fn new(way: Way, to: SocketAddr) -> Self {
        Self { way, to, count: 1, timeout_ms: 2_000 }
    }

    /// The same, `count` times.
    #[must_use]
    pub fn times(self, count: u32) -> Self {
        Self { count, ..self }
    }
}

/// What became of a question.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// It was answered.
    Answered {
        /// The server's name: that of its pod, unless it was given another.
        by: String,
        /// The client's address as the server saw it.
        client: SocketAddr,
    },
    /// Refused at once.
    Refused,
    /// No answer.
    Timeout,
    /// No way there.
    Unreachable,
    /// Anything else, in the probe's words.
    Failed(String),
}

impl Outcome {
    fn parse(text: &str) -> anyhow::Result<Self> {
        let words: Vec<&str> = text.split_whitespace().collect();
        match words.as_slice() {
            ["ok", by, client, ..] => {
                let client = client.parse().with_context(|| format!("no address: {text}"))?;
                Ok(Self::Answered { by: (*by).to_owned(), client })
            }
            ["refused", ..] => Ok(Self::Refused),
            ["timeout", ..] => Ok(Self::Timeout),
            ["unreachable", ..] => Ok(Self::Unreachable),
            ["failed", ..] => Ok(Self::Failed(text.to_owned())),
            _ => anyhow::bail!("the probe said {text:?}"),
        }
    }

    /// The server's name, if it was answered.
    #[must_use]
    pub fn by(&self) -> Option<&str> {
        match self {
            Self::Answered { by, .. } => Some(by),
            Self::Refused | Self::Timeout | Self::Unreachable | Self::Failed(_) => None,
        }
    }
}

impl Place {
    /// Asks everything at once; answers the outcomes in the order of the questions.
    ///
    /// # Errors
    /// If the probe can't run there.
    pub async fn ask(&self, site: &Site, requests: &[Request]) -> anyhow::Result<Vec<Vec<Outcome>>> {
        let mut input = String::new();
        for (id, Request { way, to, count, timeout_ms }) in requests.iter().enumerate() {
            writeln!(input, "{id} {} {to} {count} {timeout_ms}", way.word())?;
        }
        let output = match self {
            Self::Pod(pod) => {
                let said = site.exec_with(pod, &["weft-probe", "ask"], &input).await?;
                ensure!(said.success, "weft-probe in {pod}: {}", said.err);
                said.out
            }
            Self::Netns(path) => local(path, &input).await?,
        };
        let mut outcomes = BTreeMap::<usize, Vec<Outcome>>::new();
        for line in output.lines() {
            let (id, rest) = line.split_once(' ').with_context(|| format!("the probe said {line:?}"))?;
            outcomes.entry(id.parse()?).or_default().push(Outcome::parse(rest)?);
        }
        Ok((0..requests.len()).map(|id| outcomes.remove(&id).unwrap_or_default()).collect())
    }

    /// Asks one question.
    ///
    /// # Errors
    /// If the probe can't run there.
    pub async fn ask_one(&self, site: &Site, way: Way, to: SocketAddr) -> anyhow::Result<Outcome> {
        let answers = self.ask(site, &[Request::new(way, to)]).await?;
        answers.into_iter().flatten().next().context("the probe said nothing")
    }
}

/// Runs the probe in a network namespace.
async fn local(netns: &Path, input: &str) -> anyhow::Result<String> {
    let program = weft_tests_harness::artifact("weft-probe").map_err(anyhow::Error::msg)?;
    let mut command = tokio::process::Command::from(command_in(netns, program)?);
    command.arg("ask").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().context("start weft-probe")?;
    let mut stdin = child.stdin.take().context("standard input is a pipe")?;
    stdin.write_all(input.as_bytes()).await?;
    drop(stdin);
    let output = child.wait_with_output().await?;
    ensure!(output.status.success(), "weft-probe: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
