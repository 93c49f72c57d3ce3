//! The agent's side of a sandbox's init: start one, talk to one, hear from one.

use std::fs::File;
use std::io::{self, BufRead, BufReader, IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use rustix::fs::{Mode, OFlags};
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use weft_agent_runtime_init::wire::{self, Reply, Request, Sandbox};

use super::records;
use crate::Error;

/// An init answers in milliseconds, unless a mount that it makes for a container hangs.
const ANSWER: Duration = Duration::from_secs(60);
/// Answers are small; one listener per sandbox keeps its buffer.
const READ_BYTES: usize = 4 << 10;

/// Starts an init from its folder and waits until it serves. Blocks for a few milliseconds.
pub(super) fn spawn(program: &Path, folder: &Path, config: &Sandbox) -> Result<i32, Error> {
    records::save(&folder.join(wire::CONFIG), config)?;
    let log = folder.join("init.log");
    let log_file =
        File::options().create(true).append(true).open(&log).map_err(records::io_error("open", &log))?;
    let mut child = Command::new(program)
        .arg0("weft-init")
        .arg(folder)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log_file)
        .spawn()
        .map_err(records::io_error("execute", program))?;
    let mut line = String::new();
    let stdout = child.stdout.take().ok_or_else(|| refused("no pipe"))?;
    // The init forks once and holds the pipe until it serves; its parent ends at once and is reaped here.
    let read = BufReader::new(stdout.take(wire::MAX_MESSAGE_BYTES as u64)).read_line(&mut line);
    child.wait().map_err(records::io_error("wait for", program))?;
    read.map_err(records::io_error("hear from", program))?;
    match line.trim().split_once(' ') {
        Some(("ready", pid)) => pid.parse().map_err(|_no_number| refused("no pid")),
        Some((_, reason)) => Err(refused(reason)),
        None => Err(refused("weft-init ended without a word")),
    }
}

fn refused(reason: &str) -> Error {
    Error::Invalid { what: "start the sandbox's init", reason: reason.to_owned() }
}

/// A connection to an init.
pub(super) struct Connection {
    stream: UnixStream,
    received: Vec<u8>,
    path: PathBuf,
}

impl Connection {
    /// Fails at once if the init is dead.
    pub(super) async fn open(folder: &Path) -> io::Result<Self> {
        let place =
            rustix::fs::open(folder, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let stream = UnixStream::connect(wire::socket_path(place.as_fd())).await?;
        Ok(Self { stream, received: Vec::new(), path: folder.join(wire::SOCKET) })
    }

    /// Pid of the init, as this process numbers it.
    pub(super) fn peer(&self) -> Option<i32> {
        self.stream.peer_cred().ok()?.pid()
    }

    pub(super) async fn send(&mut self, request: &Request) -> io::Result<()> {
        self.stream.write_all(&wire::encode(request)?).await
    }

    /// Sends a request with descriptors.
    pub(super) async fn send_with(&mut self, request: &Request, descriptors: &[OwnedFd]) -> io::Result<()> {
        let bytes = wire::encode(request)?;
        let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let control = if raw.is_empty() { Vec::new() } else { vec![ControlMessage::ScmRights(&raw)] };
        let sent = loop {
            self.stream.writable().await?;
            let attempt = self.stream.try_io(Interest::WRITABLE, || {
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                sendmsg::<()>(self.stream.as_raw_fd(), &[IoSlice::new(&bytes)], &control, flags, None)
                    .map_err(io::Error::from)
            });
            match attempt {
                Ok(sent) => break sent,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        };
        self.stream.write_all(&bytes[sent..]).await
    }

    /// The next message; `None` when the init has closed the connection.
    pub(super) async fn receive<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        loop {
            if let Some(message) = wire::decode(&mut self.received)? {
                return Ok(Some(message));
            }
            self.received.reserve(READ_BYTES);
            let read = match self.stream.read_buf(&mut self.received).await {
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => 0,
                other => other?,
            };
            if read == 0 {
                return Ok(None);
            }
        }
    }

    /// One request, one answer.
    pub(super) async fn ask(&mut self, request: &Request) -> Result<Reply, Error> {
        let answer = async {
            self.send(request).await?;
            self.receive().await?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
        };
        let answer: Result<io::Result<Reply>, _> = tokio::time::timeout(ANSWER, answer).await;
        let late =
            |_elapsed| Error::Timeout { what: "the answer of a sandbox's init", seconds: ANSWER.as_secs() };
        answer.map_err(late)?.map_err(records::io_error("talk to", &self.path))
    }
}
