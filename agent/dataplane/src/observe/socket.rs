//! The node's control socket: root asks in one JSON line, the agent answers in one.
//!
//! It is no API: both ends are of one version. Whoever is not root (or the agent's own user) is sent away by the kernel's
//! word on the peer, whatever the file's mode says.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::WriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::flows::{Hub, Seen, Subscription};
use super::wire::{Answer, Request};
use super::{ObserveError, Observer};

/// Longest question: one Service with some 10,000 endpoints.
const MAX_REQUEST_BYTES: u64 = 1 << 20;
/// Longest answer that a client takes: the frontends of a full map.
const MAX_ANSWER_BYTES: u64 = 64 << 20;
/// Questions at once; more wait.
const MAX_CONNECTIONS: usize = 8;
/// Watchers of flows at once; more are sent away.
const MAX_WATCHERS: usize = 8;
/// How long a peer may take to write or read a line.
const PATIENCE: Duration = Duration::from_secs(10);

/// What stands on the answer's line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Line {
    Ok(Answer),
    Error(String),
}

/// Serves the socket until `shutdown`.
///
/// # Errors
/// If the socket can't be made. A node goes on without it.
pub async fn serve(
    path: PathBuf,
    observer: Arc<Observer>,
    shutdown: CancellationToken,
) -> Result<(), ObserveError> {
    let listener = listen(&path)?;
    let server = Arc::new(Server {
        hub: Hub::default(),
        watchers: Semaphore::new(MAX_WATCHERS),
        questions: Semaphore::new(MAX_CONNECTIONS),
        shutdown: shutdown.clone(),
        observer,
    });
    let pump = Arc::clone(&server);
    let (pins, cgroup) = (server.observer.pins.clone(), server.observer.cgroup.clone());
    tokio::spawn(async move { pump.hub.run(pins, cgroup, pump.shutdown.clone()).await });
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) if may_ask(&stream) => {
                tokio::spawn(Arc::clone(&server).converse(stream));
            }
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, "cannot take a question");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    match std::fs::remove_file(&path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(ObserveError::Socket { op: "remove", path, source })
        }
        _ => Ok(()),
    }
}

fn listen(path: &Path) -> Result<UnixListener, ObserveError> {
    let failed = |op| move |source| ObserveError::Socket { op, path: path.to_path_buf(), source };
    // Left by an agent that was killed; a running one holds the node's lock, so it is nobody's.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed("replace")(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed("listen at"))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed("protect"))?;
    Ok(listener)
}

fn may_ask(stream: &UnixStream) -> bool {
    let own = nix::unistd::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| peer.uid() == 0 || peer.uid() == own)
}

/// What all connections share.
struct Server {
    observer: Arc<Observer>,
    hub: Hub,
    questions: Semaphore,
    watchers: Semaphore,
    shutdown: CancellationToken,
}

impl Server {
    /// One question, one answer; or flows until the peer goes. A peer that goes away or stays silent is its own affair.
    async fn converse(self: Arc<Self>, mut stream: UnixStream) {
        let mut line = String::new();
        let (reader, mut writer) = stream.split();
        let mut reader = tokio::io::BufReader::new(reader.take(MAX_REQUEST_BYTES));
        let Ok(Ok(_)) = tokio::time::timeout(PATIENCE, reader.read_line(&mut line)).await else { return };
        let answer = match serde_json::from_str::<Request>(&line) {
            Ok(Request::Flows { drops_only }) => {
                let gone = async { while reader.read_u8().await.is_ok() {} };
                tokio::select! {
                    () = self.shutdown.cancelled() => {}
                    () = gone => {}
                    () = self.flows(&mut writer, drops_only) => {}
                }
                return;
            }
            Ok(request) => {
                let Ok(_place) = self.questions.acquire().await else { return };
                let observer = Arc::clone(&self.observer);
                tokio::task::spawn_blocking(move || observer.answer(&request)).await
            }
            Err(error) => Ok(Err(error.into())),
        };
        let line = match answer {
            Ok(Ok(answer)) => Line::Ok(answer),
            Ok(Err(error)) => Line::Error(chain(&error)),
            Err(panic) => Line::Error(panic.to_string()),
        };
        write_line(&mut writer, &line).await;
    }

    async fn flows(&self, writer: &mut WriteHalf<'_>, drops_only: bool) {
        let Ok(_place) = self.watchers.try_acquire() else {
            write_line(writer, &Line::Error(format!("{MAX_WATCHERS} watch already"))).await;
            return;
        };
        let mut subscription = self.hub.subscribe(drops_only);
        while let Some(seen) = subscription.next().await {
            if !write_line(writer, &Line::Ok(Answer::Seen(seen))).await {
                return;
            }
        }
    }
}

/// Answers whether the peer took it.
async fn write_line(writer: &mut WriteHalf<'_>, line: &Line) -> bool {
    let mut text = serde_json::to_vec(line).unwrap_or_default();
    text.push(b'\n');
    match tokio::time::timeout(PATIENCE, writer.write_all(&text)).await {
        Ok(Ok(())) => true,
        Ok(Err(error)) => {
            tracing::debug!(%error, "nobody waits for the answer");
            false
        }
        Err(_) => false,
    }
}

/// An error with its causes, in one line: it leaves this process as text.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// Asks the agent behind a socket; `None` if none listens there.
///
/// # Errors
/// If the agent can't answer.
pub fn ask(path: &Path, request: &Request) -> Result<Option<Answer>, ObserveError> {
    let failed = |op| move |source| ObserveError::Socket { op, path: path.to_path_buf(), source };
    let mut stream = match StdStream::connect(path) {
        Ok(stream) => stream,
        Err(error) if nobody_listens(&error) => return Ok(None),
        Err(error) => return Err(failed("connect to")(error)),
    };
    stream.set_read_timeout(Some(PATIENCE * 2)).map_err(failed("use"))?;
    stream.set_write_timeout(Some(PATIENCE)).map_err(failed("use"))?;
    let mut text = serde_json::to_vec(request)?;
    text.push(b'\n');
    stream.write_all(&text).map_err(failed("write to"))?;
    let mut line = String::new();
    let mut reader = BufReader::new(stream.take(MAX_ANSWER_BYTES));
    reader.read_line(&mut line).map_err(failed("read from"))?;
    match serde_json::from_str(&line)? {
        Line::Ok(answer) => Ok(Some(answer)),
        Line::Error(error) => Err(ObserveError::Agent(error)),
    }
}

/// Flows as they come: from the agent behind a socket, or without one from the ring itself.
#[derive(Debug)]
pub struct Watch {
    source: Source,
}

#[derive(Debug)]
enum Source {
    Agent(tokio::io::Lines<tokio::io::BufReader<UnixStream>>),
    Own(
        Subscription,
        #[expect(dead_code, reason = "it ends the hub when it is dropped")] tokio_util::sync::DropGuard,
    ),
}

impl Watch {
    /// Begins to watch.
    ///
    /// # Errors
    /// If the socket can't be used.
    pub async fn open(path: &Path, observer: &Observer, drops_only: bool) -> Result<Self, ObserveError> {
        let failed = |op| move |source| ObserveError::Socket { op, path: path.to_path_buf(), source };
        let mut stream = match UnixStream::connect(path).await {
            Ok(stream) => stream,
            Err(error) if nobody_listens(&error) => return Ok(Self::own(observer, drops_only)),
            Err(error) => return Err(failed("connect to")(error)),
        };
        let mut text = serde_json::to_vec(&Request::Flows { drops_only })?;
        text.push(b'\n');
        stream.write_all(&text).await.map_err(failed("write to"))?;
        Ok(Self { source: Source::Agent(tokio::io::BufReader::new(stream).lines()) })
    }

    fn own(observer: &Observer, drops_only: bool) -> Self {
        let (hub, shutdown) = (Hub::default(), CancellationToken::new());
        let subscription = hub.subscribe(drops_only);
        let (pins, cgroup, stop) = (observer.pins.clone(), observer.cgroup.clone(), shutdown.clone());
        tokio::spawn(async move { hub.run(pins, cgroup, stop).await });
        Self { source: Source::Own(subscription, shutdown.drop_guard()) }
    }

    /// The next thing seen; `None` once the agent has ended.
    ///
    /// # Errors
    /// If the agent sends something else, or says why it can't.
    pub async fn next(&mut self) -> Result<Option<Seen>, ObserveError> {
        let lines = match &mut self.source {
            Source::Own(subscription, _) => return Ok(subscription.next().await),
            Source::Agent(lines) => lines,
        };
        // An agent that was killed resets the connection: it has ended, no more.
        let Ok(Some(line)) = lines.next_line().await else { return Ok(None) };
        match serde_json::from_str(&line)? {
            Line::Ok(Answer::Seen(seen)) => Ok(Some(seen)),
            Line::Ok(_) => Err(ObserveError::Agent("something else than flows".to_owned())),
            Line::Error(error) => Err(ObserveError::Agent(error)),
        }
    }
}

fn nobody_listens(error: &std::io::Error) -> bool {
    [std::io::ErrorKind::NotFound, std::io::ErrorKind::ConnectionRefused].contains(&error.kind())
}
