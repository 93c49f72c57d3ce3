//! The loads: requests one after the other over connections that stay, and one stream. The server checks and says what it got.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::service::traffic::within;
use crate::stats::as_f64;

/// Whatever takes longer is lost.
const LOST_AFTER: Duration = Duration::from_secs(20);
/// Connections of a turn of requests, and requests of each.
const CONNECTIONS: usize = 4;
const REQUESTS: usize = 10_000;
/// Bytes of a stream, in pieces of that many; a turn takes a second or so.
const PIECE_BYTES: usize = 65_536;
const PIECES: usize = 32_768;

/// What a turn does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// A byte there and the same back, over and over.
    Requests,
    /// Bytes one way.
    Stream,
}

impl Work {
    /// The unit of [`Work::amount`] per second of CPU.
    pub(super) fn unit(self) -> &'static str {
        match self {
            Self::Requests => "thousand/CPU-s",
            Self::Stream => "GB/CPU-s",
        }
    }

    /// Requests, or pieces, of a turn.
    pub(super) fn expected(self) -> usize {
        match self {
            Self::Requests => CONNECTIONS * REQUESTS,
            Self::Stream => PIECES,
        }
    }

    /// In the unit.
    pub(super) fn amount(self, done: f64) -> f64 {
        match self {
            Self::Requests => done / 1e3,
            Self::Stream => done * as_f64(PIECE_BYTES) / 1e9,
        }
    }

    /// Does it from a namespace; answers how much was done and confirmed.
    pub(super) fn run(self, netns: &File, to: SocketAddrV4) -> anyhow::Result<usize> {
        within(netns, move || {
            std::thread::scope(|scope| {
                let count = if self == Self::Requests { CONNECTIONS } else { 1 };
                let clients: Vec<_> = (0..count).map(|_| scope.spawn(move || self.client(to))).collect();
                clients
                    .into_iter()
                    .map(|one| one.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a client panicked"))))
                    .sum()
            })
        })?
    }

    fn client(self, to: SocketAddrV4) -> anyhow::Result<usize> {
        let mut stream = TcpStream::connect_timeout(&to.into(), LOST_AFTER).context("connect")?;
        prepare(&stream)?;
        match self {
            Self::Requests => {
                stream.write_all(b"r")?;
                for number in 0..REQUESTS {
                    let byte = u8::try_from(number % 251)?;
                    stream.write_all(&[byte])?;
                    let mut answer = [0];
                    stream.read_exact(&mut answer).context("an answer")?;
                    ensure!(answer[0] == byte, "the answer is another's");
                }
                Ok(REQUESTS)
            }
            Self::Stream => {
                stream.write_all(b"s")?;
                let piece = vec![7; PIECE_BYTES];
                for _ in 0..PIECES {
                    stream.write_all(&piece).context("send a piece")?;
                }
                stream.shutdown(std::net::Shutdown::Write)?;
                let mut counted = [0; 8];
                stream.read_exact(&mut counted).context("what arrived")?;
                Ok(usize::try_from(u64::from_le_bytes(counted))? / PIECE_BYTES)
            }
        }
    }
}

fn prepare(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(LOST_AFTER))?;
    stream.set_write_timeout(Some(LOST_AFTER))
}

/// A server in a namespace, until it is dropped.
pub(super) struct Server {
    pub(super) address: SocketAddrV4,
    listener: TcpListener,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub(super) fn start(netns: &File, address: SocketAddrV4) -> anyhow::Result<Self> {
        let listener = within(netns, move || TcpListener::bind(address).context("listen in a pod"))??;
        let accepting = listener.try_clone()?;
        let thread = std::thread::spawn(move || {
            // Accepting fails when the listener is shut down: that is the end.
            while let Ok((stream, _)) = accepting.accept() {
                std::thread::spawn(move || {
                    if let Err(error) = serve(stream) {
                        eprintln!("a server gave up: {error}");
                    }
                });
            }
        });
        Ok(Self { address, listener, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let ended = nix::sys::socket::shutdown(self.listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        if ended.is_err() || self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            eprintln!("a server did not end");
        }
    }
}

fn serve(mut stream: TcpStream) -> std::io::Result<()> {
    prepare(&stream)?;
    let mut kind = [0];
    stream.read_exact(&mut kind)?;
    let mut buffer = vec![0; PIECE_BYTES];
    let mut arrived = 0_u64;
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        arrived += u64::try_from(count).unwrap_or(0);
        if kind == *b"r" {
            stream.write_all(&buffer[..count])?;
        }
    }
    if kind == *b"s" {
        stream.write_all(&arrived.to_le_bytes())?;
    }
    Ok(())
}
