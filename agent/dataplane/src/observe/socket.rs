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
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::wire::{Answer, Request};
use super::{ObserveError, Observer};

/// Longest question: one Service with some 10,000 endpoints.
const MAX_REQUEST_BYTES: u64 = 1 << 20;
/// Longest answer that a client takes: the frontends of a full map.
const MAX_ANSWER_BYTES: u64 = 64 << 20;
/// Questions at once; more wait.
const MAX_CONNECTIONS: usize = 8;
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
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) if may_ask(&stream) => stream,
            Ok(_) => continue,
            Err(error) => {
                tracing::warn!(%error, "cannot take a question");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { break };
        let observer = Arc::clone(&observer);
        tokio::spawn(async move {
            if let Err(error) = tokio::time::timeout(PATIENCE * 2, converse(stream, observer)).await {
                tracing::debug!(%error, "a question was given up");
            }
            drop(place);
        });
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

/// One question, one answer. A peer that goes away or stays silent is its own affair.
async fn converse(mut stream: UnixStream, observer: Arc<Observer>) {
    let mut line = String::new();
    let (reader, mut writer) = stream.split();
    let mut reader = tokio::io::BufReader::new(reader.take(MAX_REQUEST_BYTES));
    if reader.read_line(&mut line).await.is_err() {
        return;
    }
    let answer = match serde_json::from_str::<Request>(&line) {
        Ok(request) => tokio::task::spawn_blocking(move || observer.answer(&request)).await,
        Err(error) => Ok(Err(error.into())),
    };
    let line = match answer {
        Ok(Ok(answer)) => Line::Ok(answer),
        Ok(Err(error)) => Line::Error(chain(&error)),
        Err(panic) => Line::Error(panic.to_string()),
    };
    let mut text = serde_json::to_vec(&line).unwrap_or_default();
    text.push(b'\n');
    if let Err(error) = writer.write_all(&text).await {
        tracing::debug!(%error, "nobody waits for the answer");
    }
}

/// An error with its causes, in one line: it leaves this process as text.
fn chain(error: &dyn std::error::Error) -> String {
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
        Err(error)
            if [std::io::ErrorKind::NotFound, std::io::ErrorKind::ConnectionRefused]
                .contains(&error.kind()) =>
        {
            return Ok(None);
        }
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
