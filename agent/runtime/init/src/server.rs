//! The loop of a sandbox's init: requests of agents, output of containers, ends of processes.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use weft_agent_runtime_init::cgroup;
use weft_agent_runtime_init::wire::{self, Exec, Exit, Reply, Request, Run, Start, Status};

use crate::clock;
use crate::connection::Connection;
use crate::launch::{self, Launched};
use crate::log::{self, Log, Pending, Stream};
use crate::process::Streams;

/// More than an agent opens: one stream of events, probes and execs.
const MAX_CONNECTIONS: usize = 512;
const READ_BYTES: usize = 64 << 10;

struct Output {
    stream: Stream,
    fd: OwnedFd,
    pending: Pending,
    ended: bool,
}

struct Container {
    spec: Box<Start>,
    pid: i32,
    pidfd: OwnedFd,
    started_at_ns: i64,
    outputs: Vec<Output>,
    log: Log,
    log_failed: bool,
    /// Held, never written: attach comes later.
    _stdin: Option<OwnedFd>,
    exit: Option<Exit>,
}

struct Command {
    connection: u64,
    pidfd: OwnedFd,
}

/// Everything the init knows.
pub(crate) struct Server {
    listener: UnixListener,
    signals: SignalFd,
    connections: BTreeMap<u64, Connection>,
    next_connection: u64,
    containers: BTreeMap<String, Container>,
    commands: BTreeMap<i32, Command>,
    stopping: bool,
}

#[derive(Clone)]
enum Token {
    Signals,
    Listener,
    Connection(u64),
    Output(String, usize),
}

impl Server {
    pub(crate) fn new(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let mut mask = SigSet::empty();
        [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT].into_iter().for_each(|signal| mask.add(signal));
        mask.thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        Ok(Self {
            listener,
            signals,
            connections: BTreeMap::new(),
            next_connection: 0,
            containers: BTreeMap::new(),
            commands: BTreeMap::new(),
            stopping: false,
        })
    }

    /// Serves until told to stop and all containers have ended.
    pub(crate) fn run(mut self) -> io::Result<()> {
        loop {
            for (token, events) in self.wait()? {
                match token {
                    Token::Signals => self.signalled(),
                    Token::Listener => self.accept(),
                    Token::Connection(id) => self.serve(id, events),
                    Token::Output(id, index) => self.pump(&id, index),
                }
            }
            self.drop_closed();
            if self.stopping && self.containers.values().all(|container| container.exit.is_some()) {
                self.farewell();
                return Ok(());
            }
        }
    }

    fn wait(&self) -> io::Result<Vec<(Token, PollFlags)>> {
        let (read, write) = (PollFlags::POLLIN, PollFlags::POLLOUT);
        let mut tokens = vec![Token::Signals, Token::Listener];
        let mut polled =
            vec![PollFd::new(self.signals.as_fd(), read), PollFd::new(self.listener.as_fd(), read)];
        for (id, connection) in &self.connections {
            tokens.push(Token::Connection(*id));
            let flags = if connection.unsent.is_empty() { read } else { read | write };
            polled.push(PollFd::new(connection.stream.as_fd(), flags));
        }
        for (id, container) in &self.containers {
            for (index, output) in container.outputs.iter().enumerate().filter(|(_, output)| !output.ended) {
                tokens.push(Token::Output(id.clone(), index));
                polled.push(PollFd::new(output.fd.as_fd(), read));
            }
        }
        match poll(&mut polled, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let events = polled.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
        Ok(tokens.into_iter().zip(events).filter(|(_, events)| !events.is_empty()).collect())
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.connections.len() >= MAX_CONNECTIONS || stream.set_nonblocking(true).is_err() {
                continue;
            }
            self.connections.insert(self.next_connection, Connection::new(stream));
            self.next_connection += 1;
        }
    }

    fn serve(&mut self, id: u64, events: PollFlags) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if events.contains(PollFlags::POLLOUT) {
            connection.flush();
        }
        if events.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) {
            connection.read();
        }
        loop {
            let Some(connection) = self.connections.get_mut(&id) else { return };
            match wire::decode::<Request>(&mut connection.received) {
                Ok(Some(request)) => self.handle(id, request),
                Ok(None) => return,
                Err(error) => {
                    connection.send(&Reply::Failed { message: format!("bad request: {error}") });
                    connection.closed = true;
                    return;
                }
            }
        }
    }

    fn handle(&mut self, id: u64, request: Request) {
        let reply = match request {
            Request::Start(spec) => Some(self.start(spec)),
            Request::Signal { container, signal } => Some(self.signal(&container, signal)),
            Request::Exec(exec) => self.exec(id, &exec),
            Request::Subscribe => {
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.subscribed = true;
                }
                Some(Reply::Containers(
                    self.containers.iter().map(|(id, container)| container.status(id)).collect(),
                ))
            }
            Request::Forget { container } => Some(self.forget(&container)),
            Request::Shutdown => {
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.awaits_shutdown = true;
                }
                self.stop();
                None
            }
        };
        if let (Some(reply), Some(connection)) = (reply, self.connections.get_mut(&id)) {
            connection.send(&reply);
        }
    }

    /// Repeating a start that has succeeded is no second start: an agent may have died before it heard the answer.
    fn start(&mut self, spec: Box<Start>) -> Reply {
        if self.stopping {
            return failed("the sandbox is stopping".to_owned());
        }
        if let Some(container) = self.containers.get(&spec.id) {
            return Reply::Started { pid: container.pid, started_at_ns: container.started_at_ns };
        }
        let log = match Log::open(&spec.log, log::MAX_FILE_BYTES) {
            Ok(log) => log,
            Err(error) => return failed(format!("open the log {}: {error}", spec.log.display())),
        };
        let launched = match launch::start(&spec) {
            Ok(launched) => launched,
            Err(message) => return failed(message),
        };
        let Launched { pid, pidfd, output, stdin } = launched;
        let started_at_ns = clock::now_ns();
        let outputs: Vec<Output> = output
            .into_iter()
            .map(|(stream, fd)| Output { stream, fd, pending: Pending::default(), ended: false })
            .collect();
        for output in &outputs {
            // A blocking read would only cost time: poll has said that there is something to read.
            let _ = nonblocking(&output.fd);
        }
        save(&spec.state.join(wire::RUN_FILE), &Run { pid, started_at_ns });
        let id = spec.id.clone();
        let container = Container {
            spec,
            pid,
            pidfd,
            started_at_ns,
            outputs,
            log,
            log_failed: false,
            _stdin: stdin,
            exit: None,
        };
        self.containers.insert(id, container);
        Reply::Started { pid, started_at_ns }
    }

    fn signal(&self, id: &str, signal: i32) -> Reply {
        let Some(container) = self.containers.get(id) else { return unknown(id) };
        if container.exit.is_some() {
            return Reply::Done;
        }
        match send_signal(&container.pidfd, signal) {
            Ok(()) | Err(Errno::ESRCH) => Reply::Done,
            Err(error) => failed(format!("signal {signal}: {error}")),
        }
    }

    /// Answers at once only if the command can't be started.
    fn exec(&mut self, connection: u64, request: &Exec) -> Option<Reply> {
        let from = self.connections.get_mut(&connection)?;
        if from.descriptors.len() < request.descriptors() {
            return Some(failed("descriptors are missing".to_owned()));
        }
        let mut descriptors = from.descriptors.drain(..request.descriptors());
        let mut next = |sent: bool| if sent { descriptors.next() } else { None };
        let streams = Streams {
            stdin: next(request.stdin),
            stdout: next(request.stdout),
            stderr: next(request.stderr),
            tty: next(request.tty),
        };
        drop(descriptors);
        let Some(container) = self.containers.get(&request.container) else {
            return Some(unknown(&request.container));
        };
        if container.exit.is_some() {
            return Some(failed(format!("container {} is not running", request.container)));
        }
        match launch::exec(&container.spec, container.pidfd.as_fd(), request, streams) {
            Ok(Launched { pid, pidfd, .. }) => {
                self.commands.insert(pid, Command { connection, pidfd });
                None
            }
            Err(message) => Some(failed(message)),
        }
    }

    fn forget(&mut self, id: &str) -> Reply {
        if self.containers.get(id).is_some_and(|container| container.exit.is_none()) {
            return failed(format!("container {id} is running"));
        }
        self.containers.remove(id);
        Reply::Done
    }

    fn stop(&mut self) {
        self.stopping = true;
        for container in self.containers.values().filter(|container| container.exit.is_none()) {
            // ESRCH: it has ended and waits to be reaped.
            let _ = send_signal(&container.pidfd, libc::SIGKILL);
            container.kill_rest();
        }
    }

    fn signalled(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            if info.ssi_signo != u32::try_from(libc::SIGCHLD).unwrap_or_default() {
                self.stop();
            }
        }
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => self.ended(pid.as_raw(), code),
                Ok(WaitStatus::Signaled(pid, signal, _)) => self.ended(pid.as_raw(), 128 + signal as i32),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                // Stopped or traced children aren't asked for; EINTR asks again.
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => {
                    eprintln!("waitpid: {error}");
                    return;
                }
            }
        }
    }

    fn ended(&mut self, pid: i32, code: i32) {
        if let Some(command) = self.commands.remove(&pid) {
            if let Some(connection) = self.connections.get_mut(&command.connection) {
                connection.send(&Reply::Exited { code });
            }
            return;
        }
        let found = self
            .containers
            .iter_mut()
            .find(|(_, container)| container.pid == pid && container.exit.is_none());
        let Some((id, container)) = found else { return };
        container.end(code);
        let event = Reply::Event(container.status(id));
        for connection in self.connections.values_mut().filter(|connection| connection.subscribed) {
            connection.send(&event);
        }
    }

    fn pump(&mut self, id: &str, index: usize) {
        if let Some(container) = self.containers.get_mut(id) {
            container.pump(index);
        }
    }

    fn drop_closed(&mut self) {
        let closed: Vec<u64> =
            self.connections.iter().filter(|(_, connection)| connection.closed).map(|(id, _)| *id).collect();
        for id in closed {
            self.connections.remove(&id);
            for command in self.commands.values().filter(|command| command.connection == id) {
                // Its streams and its caller are gone; it is reaped as any child.
                let _ = send_signal(&command.pidfd, libc::SIGKILL);
            }
        }
    }

    fn farewell(&mut self) {
        for connection in self.connections.values_mut().filter(|connection| connection.awaits_shutdown) {
            connection.send(&Reply::Done);
        }
    }
}

impl Container {
    fn status(&self, id: &str) -> Status {
        let pid = if self.exit.is_some() { 0 } else { self.pid };
        Status { id: id.to_owned(), pid, started_at_ns: self.started_at_ns, exit: self.exit.clone() }
    }

    /// Reads an output until it has nothing more for now.
    fn pump(&mut self, index: usize) {
        let Some(output) = self.outputs.get_mut(index).filter(|output| !output.ended) else { return };
        let mut bytes = [0; READ_BYTES];
        let result = match nix::unistd::read(&output.fd, &mut bytes) {
            Ok(length) if length > 0 => self.log.take(output.stream, &mut output.pending, &bytes[..length]),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(()),
            // EIO is how the master of a terminal says that the other side is closed.
            Ok(_) | Err(_) => {
                output.ended = true;
                self.log.end(output.stream, &mut output.pending)
            }
        };
        // A full disk must not block the container: its output is lost, and said so once.
        match result {
            Ok(()) => self.log_failed = false,
            Err(error) if !self.log_failed => {
                self.log_failed = true;
                eprintln!("write the log {}: {error}", self.spec.log.display());
            }
            Err(_) => {}
        }
    }

    /// All output up to the end first, then the exit code: whoever sees the code finds the log complete.
    fn end(&mut self, code: i32) {
        self.kill_rest();
        for index in 0..self.outputs.len() {
            while self.readable(index) {
                self.pump(index);
            }
            let output = &mut self.outputs[index];
            if !output.ended {
                output.ended = true;
                if let Err(error) = self.log.end(output.stream, &mut output.pending) {
                    eprintln!("write the log {}: {error}", self.spec.log.display());
                }
            }
        }
        self.outputs.clear();
        let exit = Exit {
            code,
            started_at_ns: self.started_at_ns,
            finished_at_ns: clock::now_ns(),
            oom_killed: self.spec.cgroups.oom.as_deref().is_some_and(|file| cgroup::oom_kills(file) > 0),
            message: String::new(),
        };
        save(&self.spec.state.join(wire::EXIT_FILE), &exit);
        self.exit = Some(exit);
    }

    fn readable(&self, index: usize) -> bool {
        let output = &self.outputs[index];
        let mut polled = [PollFd::new(output.fd.as_fd(), PollFlags::POLLIN)];
        !output.ended && poll(&mut polled, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// In the node's PID namespace the end of the first process is not the end of the others.
    fn kill_rest(&self) {
        if let Some(unified) = self.spec.cgroups.unified.as_ref().filter(|_| self.spec.host_pid) {
            // Before Linux 5.14 the agent kills what is left when it removes the container.
            let _ = fs::write(unified.join("cgroup.kill"), "1");
        }
    }
}

fn nonblocking(fd: &OwnedFd) -> nix::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop)
}

fn send_signal(pidfd: &OwnedFd, signal: i32) -> nix::Result<()> {
    crate::sys::pidfd_send_signal(pidfd.as_fd(), signal)
        .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))
}

/// Written aside and renamed, so that a reader sees all or nothing.
fn save<T: serde::Serialize>(path: &Path, value: &T) {
    let aside = path.with_extension("new");
    let result = serde_json::to_vec(value)
        .map_err(io::Error::from)
        .and_then(|bytes| fs::write(&aside, bytes))
        .and_then(|()| fs::rename(&aside, path));
    if let Err(error) = result {
        eprintln!("write {}: {error}", path.display());
    }
}

fn failed(message: String) -> Reply {
    Reply::Failed { message }
}

fn unknown(id: &str) -> Reply {
    failed(format!("no container {id}"))
}
