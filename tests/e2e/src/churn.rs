//! Clients for the churn test: connections and datagrams counted one by one, from sockets that the socket hooks see and from ones
//! that only the pod's edge sees.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{setsockopt, sockopt};

/// A connection or datagram without an answer by then is lost.
const LOST_AFTER: Duration = Duration::from_secs(5);
/// Between two requests of a client: the pods that come and go need the processors too.
const PAUSE: Duration = Duration::from_millis(1);
/// Losses that are kept with their reason; all are counted.
const MAX_KEPT: usize = 1_000;

/// A request that got no answer.
#[derive(Clone, Debug)]
pub struct Loss {
    /// When it began.
    pub begun: Instant,
    /// When it was given up.
    pub ended: Instant,
    /// Why.
    pub reason: String,
}

/// What clients have come to so far.
#[derive(Debug, Default)]
struct Count {
    stop: AtomicBool,
    answered: AtomicU64,
    lost: AtomicU64,
    losses: Mutex<Vec<Loss>>,
    /// Answers by the pod that gave them.
    by: Mutex<BTreeMap<String, u64>>,
}

/// Clients in a network namespace, until stopped.
#[derive(Debug)]
pub struct Askers {
    count: Arc<Count>,
    threads: Vec<JoinHandle<anyhow::Result<()>>>,
}

/// How a client asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// A connection for each request.
    Tcp,
    /// Datagrams of one connected socket; when it is ended because its backend is gone, of another.
    ConnectedUdp,
    /// Datagrams of one socket that is not connected.
    Udp,
}

impl Askers {
    /// Starts so many in a namespace.
    ///
    /// # Errors
    /// If the namespace's file can't be used twice.
    pub fn start(netns: &File, to: SocketAddr, way: Way, clients: usize) -> anyhow::Result<Self> {
        let count = Arc::new(Count::default());
        let mut threads = Vec::new();
        for _ in 0..clients {
            let (netns, count) = (netns.try_clone()?, Arc::clone(&count));
            threads.push(std::thread::spawn(move || {
                setns(netns.as_fd(), CloneFlags::CLONE_NEWNET).context("enter the namespace")?;
                match way {
                    Way::Tcp => connections(&count, to),
                    Way::ConnectedUdp => datagrams(&count, to, true),
                    Way::Udp => datagrams(&count, to, false),
                }
            }));
        }
        Ok(Self { count, threads })
    }

    /// Answers so far.
    pub fn answered(&self) -> u64 {
        self.count.answered.load(Ordering::Relaxed)
    }

    /// Losses so far.
    pub fn lost(&self) -> u64 {
        self.count.lost.load(Ordering::Relaxed)
    }

    /// Some of the losses so far, with their reasons.
    pub fn losses(&self) -> Vec<Loss> {
        self.count.losses.lock().map(|losses| losses.clone()).unwrap_or_default()
    }

    /// Answers since the last call, by pod.
    pub fn take_answers(&self) -> BTreeMap<String, u64> {
        self.count.by.lock().map(|mut by| std::mem::take(&mut *by)).unwrap_or_default()
    }

    /// Ends them; each finishes its last request.
    ///
    /// # Errors
    /// If one couldn't run.
    pub fn stop(self) -> anyhow::Result<()> {
        self.count.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().map_err(|panic| anyhow::anyhow!("a client panicked: {panic:?}"))??;
        }
        Ok(())
    }
}

impl Count {
    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    fn record(&self, begun: Instant, outcome: anyhow::Result<String>) {
        match outcome {
            Ok(name) => {
                self.answered.fetch_add(1, Ordering::Relaxed);
                if let Ok(mut by) = self.by.lock() {
                    *by.entry(name).or_default() += 1;
                }
            }
            Err(error) => {
                self.lost.fetch_add(1, Ordering::Relaxed);
                let loss = Loss { begun, ended: Instant::now(), reason: format!("{error:#}") };
                if let Ok(mut losses) = self.losses.lock()
                    && losses.len() < MAX_KEPT
                {
                    losses.push(loss);
                }
            }
        }
    }
}

fn connections(count: &Count, to: SocketAddr) -> anyhow::Result<()> {
    while count.goes_on() {
        let begun = Instant::now();
        count.record(begun, connection(to));
        std::thread::park_timeout(PAUSE);
    }
    Ok(())
}

/// One connection, closed by a reset once it is answered: neither end keeps it, and ports don't run out.
fn connection(to: SocketAddr) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, LOST_AFTER).context("connect")?;
    stream.set_read_timeout(Some(LOST_AFTER))?;
    stream.write_all(b"GET /hostname HTTP/1.1\r\nHost: churn\r\n\r\n").context("send")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("receive")?;
    let Some((head, body)) = answer.split_once("\r\n\r\n") else { bail!("half an answer: {answer:?}") };
    ensure!(head.starts_with("HTTP/1.1 200 "), "{head}");
    setsockopt(&stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 }).context("set linger")?;
    Ok(body.trim_end().to_owned())
}

fn datagrams(count: &Count, to: SocketAddr, connected: bool) -> anyhow::Result<()> {
    let mut socket = datagram_socket(to, connected)?;
    let mut number = 0_u64;
    while count.goes_on() {
        number += 1;
        let begun = Instant::now();
        let outcome = datagram(&socket, to, connected, number);
        // A connected socket is told that its backend is gone, and its owner connects another: that is the way to follow.
        if connected && outcome.as_ref().is_err_and(is_ended) {
            socket = datagram_socket(to, connected)?;
            continue;
        }
        count.record(begun, outcome);
        std::thread::park_timeout(PAUSE);
    }
    Ok(())
}

fn datagram_socket(to: SocketAddr, connected: bool) -> anyhow::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).context("bind")?;
    socket.set_read_timeout(Some(LOST_AFTER))?;
    if connected {
        // Between one backend's end and the next list there is always another backend.
        socket.connect(to).context("connect")?;
    }
    Ok(socket)
}

fn is_ended(error: &anyhow::Error) -> bool {
    let raw = error.root_cause().downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
    matches!(raw, Some(libc::ECONNABORTED | libc::EDESTADDRREQ))
}

/// The probe answers with its name and what it was asked. Answers to earlier datagrams are passed over.
fn datagram(socket: &UdpSocket, to: SocketAddr, connected: bool, number: u64) -> anyhow::Result<String> {
    let asked = format!("n{number}");
    if connected {
        socket.send(asked.as_bytes()).context("send")?;
    } else {
        socket.send_to(asked.as_bytes(), to).context("send")?;
    }
    let mut buffer = [0_u8; 512];
    loop {
        let (length, from) = socket.recv_from(&mut buffer).context("receive")?;
        ensure!(connected || from == to, "answered by {from}");
        let answer = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned();
        if answer.split_whitespace().last() == Some(asked.as_str()) {
            return Ok(answer.split_whitespace().next().unwrap_or_default().to_owned());
        }
    }
}
