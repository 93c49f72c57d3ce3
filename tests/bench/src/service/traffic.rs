//! Servers in the pods' namespaces and clients in the node's: threads of this process, so that all of it is seen as one cost.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{setsockopt, sockopt};

/// A connection that isn't answered by then is lost.
const LOST_AFTER: Duration = Duration::from_secs(5);
/// Of connections that need not be answered yet, by an address that is served.
const SHORT: Duration = Duration::from_millis(500);
/// Likewise by one that nobody may serve yet. Its first packet then goes nowhere, and as long as that is waited for nobody sees that
/// the next would be answered: a start can be timed no more exactly than this.
const BLINK: Duration = Duration::from_millis(5);

/// A server in each pod: it answers a connection with the pod's address, and closes it.
pub(crate) struct Backends {
    servers: Vec<(TcpListener, JoinHandle<()>)>,
}

impl Backends {
    /// Starts them in the pods of a node.
    pub(crate) fn start(node: &str, pods: &[Ipv4Addr], port: u16) -> anyhow::Result<Self> {
        let found = pods.iter().map(|pod| Ok((*pod, netns_of(node, *pod)?)));
        Self::listen(found.collect::<anyhow::Result<_>>()?, port)
    }

    /// Starts them in namespaces that have their addresses.
    pub(crate) fn within(pods: &[(Ipv4Addr, PathBuf)], port: u16) -> anyhow::Result<Self> {
        let open = |path: &Path| File::open(path).context("open a pod's namespace");
        let opened = pods.iter().map(|(pod, path)| Ok((*pod, open(path)?)));
        Self::listen(opened.collect::<anyhow::Result<_>>()?, port)
    }

    fn listen(pods: Vec<(Ipv4Addr, File)>, port: u16) -> anyhow::Result<Self> {
        let mut servers = Vec::new();
        for (pod, netns) in pods {
            let address = SocketAddrV4::new(pod, port);
            let listener = within(&netns, move || TcpListener::bind(address).context("listen in a pod"))??;
            let accepting = listener.try_clone()?;
            let octets = pod.octets();
            servers.push((listener, std::thread::spawn(move || serve(&accepting, octets))));
        }
        Ok(Self { servers })
    }
}

impl Drop for Backends {
    fn drop(&mut self) {
        for (listener, thread) in self.servers.drain(..) {
            let ended = nix::sys::socket::shutdown(listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
            if ended.is_err() || thread.join().is_err() {
                eprintln!("a server did not end");
            }
        }
    }
}

fn serve(listener: &TcpListener, answer: [u8; 4]) {
    // Accepting fails when the listener is shut down: that is the end.
    while let Ok((mut stream, _)) = listener.accept() {
        // A client that has gone counts the loss itself.
        let _ = stream.write_all(&answer).and_then(|()| stream.shutdown(Shutdown::Write));
    }
}

/// The network namespace that has an address, found among those of the inits of a node's sandboxes.
fn netns_of(node: &str, address: Ipv4Addr) -> anyhow::Result<File> {
    // Another cluster on this machine may have the same addresses: an init is told where its sandbox's folder is.
    let sandboxes = format!("/{node}/sandboxes/");
    for entry in fs::read_dir("/proc")? {
        let folder = entry?.path();
        // Processes come and go while this looks.
        if fs::read_to_string(folder.join("cmdline"))
            .is_ok_and(|line| line.starts_with("weft-init") && line.contains(&sandboxes))
            && let Ok(netns) = File::open(folder.join("ns/net"))
            && within(&netns, move || has(address))??
        {
            return Ok(netns);
        }
    }
    anyhow::bail!("no sandbox has the address {address}")
}

fn has(address: Ipv4Addr) -> anyhow::Result<bool> {
    let mut all = nix::ifaddrs::getifaddrs().context("list addresses")?;
    Ok(all.any(|one| {
        one.address.and_then(|a| a.as_sockaddr_in().map(nix::sys::socket::SockaddrIn::ip)) == Some(address)
    }))
}

/// Runs something on a thread that has entered a network namespace.
pub(crate) fn within<T: Send + 'static>(
    netns: &File,
    work: impl FnOnce() -> T + Send + 'static,
) -> anyhow::Result<T> {
    let netns = netns.try_clone()?;
    let thread = std::thread::spawn(move || {
        setns(&netns, CloneFlags::CLONE_NEWNET).context("enter a network namespace")?;
        Ok(work())
    });
    thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked")))
}

/// What clients do in one turn.
#[derive(Clone)]
pub(crate) struct Load {
    /// Connected to in turn.
    pub(crate) addresses: Vec<SocketAddrV4>,
    pub(crate) clients: usize,
    /// Connections of each client.
    pub(crate) each: usize,
}

/// What came of it.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Answers by backend.
    pub(crate) backends: BTreeMap<Ipv4Addr, usize>,
    /// From connect to the first byte.
    pub(crate) micros: Vec<f64>,
}

/// Clients in the node's namespace.
pub(crate) struct Client {
    netns: File,
}

impl Client {
    /// `netns` is the file that keeps the namespace.
    pub(crate) fn new(netns: &Path) -> anyhow::Result<Self> {
        Ok(Self { netns: File::open(netns).context("open the node's namespace")? })
    }

    /// Who serves one connection.
    pub(crate) fn ask(&self, to: SocketAddrV4) -> anyhow::Result<Ipv4Addr> {
        within(&self.netns, move || ask(to, LOST_AFTER))?
    }

    /// When the first connection is served by `backend`, asked again and again. Until then any other may serve, or none.
    pub(crate) fn until_first(
        &self,
        to: SocketAddrV4,
        backend: Ipv4Addr,
        patience: Duration,
    ) -> anyhow::Result<Instant> {
        self.until_served(to, patience, SHORT, move |served| served == backend)
    }

    /// When the first connection is served by anybody. Until then the address may be nobody's.
    pub(crate) fn until_any(&self, to: SocketAddrV4, patience: Duration) -> anyhow::Result<Instant> {
        self.until_served(to, patience, BLINK, |_| true)
    }

    /// Asks until each of these has served.
    pub(crate) fn until(
        &self,
        to: SocketAddrV4,
        backends: &[Ipv4Addr],
        patience: Duration,
    ) -> anyhow::Result<()> {
        backends.iter().try_for_each(|backend| self.until_first(to, *backend, patience).map(|_| ()))
    }

    fn until_served(
        &self,
        to: SocketAddrV4,
        patience: Duration,
        each: Duration,
        wanted: impl Fn(Ipv4Addr) -> bool + Send + 'static,
    ) -> anyhow::Result<Instant> {
        within(&self.netns, move || {
            let deadline = Instant::now() + patience;
            loop {
                let served = ask(to, each);
                let now = Instant::now();
                if served.as_ref().is_ok_and(|served| wanted(*served)) {
                    return Ok(now);
                }
                ensure!(now < deadline, "{to} is not served as wanted; the last connection: {served:?}");
                // Refused at once: leave the processor to who is to serve.
                if served.is_err() {
                    std::thread::park_timeout(Duration::from_micros(200));
                }
            }
        })?
    }

    /// Makes all connections; one that is lost is an error.
    pub(crate) fn run(&self, load: &Load) -> anyhow::Result<Outcome> {
        let load = load.clone();
        // Threads start in the namespace of the one that starts them.
        within(&self.netns, move || {
            std::thread::scope(|scope| {
                let load = &load;
                let clients: Vec<_> =
                    (0..load.clients).map(|number| scope.spawn(move || client(load, number))).collect();
                let mut all = Outcome::default();
                for client in clients {
                    let one = client.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a client panicked")))?;
                    all.micros.extend(one.micros);
                    for (backend, count) in one.backends {
                        *all.backends.entry(backend).or_default() += count;
                    }
                }
                Ok(all)
            })
        })?
    }
}

/// One connection: the address of who serves it.
pub(crate) fn ask(to: SocketAddrV4, patience: Duration) -> anyhow::Result<Ipv4Addr> {
    let mut stream = TcpStream::connect_timeout(&to.into(), patience).context("connect")?;
    stream.set_read_timeout(Some(patience))?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).context("read")?;
    reset(&stream)?;
    Ok(answer.into())
}

fn client(load: &Load, number: usize) -> anyhow::Result<Outcome> {
    let mut outcome = Outcome::default();
    for turn in 0..load.each {
        let address = load.addresses[(number + turn) % load.addresses.len()];
        let begin = Instant::now();
        let mut stream = TcpStream::connect(address).with_context(|| format!("connect to {address}"))?;
        stream.set_read_timeout(Some(LOST_AFTER))?;
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).with_context(|| format!("read from {address}"))?;
        outcome.micros.push(begin.elapsed().as_secs_f64() * 1e6);
        *outcome.backends.entry(answer.into()).or_default() += 1;
        reset(&stream)?;
    }
    ensure!(outcome.micros.len() == load.each, "a client stopped early");
    Ok(outcome)
}

/// Makes closing a reset: neither end keeps the connection, and ports don't run out.
fn reset(stream: &TcpStream) -> anyhow::Result<()> {
    setsockopt(stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 }).context("set linger")
}
