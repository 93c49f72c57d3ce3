//! The client: many requests at once, and what became of each.
//!
//! A request is a line `ID tcp|udp|sendto ADDRESS:PORT COUNT TIMEOUT_MS`; `sendto` is UDP by a socket that isn't connected. For each of
//! its `COUNT` tries, one after the other, there is an outcome: `ID ok NAME CLIENT …` (what the server said) or
//! `ID refused|timeout|unreachable|failed [DETAIL]`.

use std::collections::VecDeque;
use std::io::{self, BufRead as _, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// Requests under way at a time.
const WORKERS: usize = 64;

#[derive(Clone, Copy)]
enum Way {
    Tcp,
    Udp,
    SendTo,
}

struct Request {
    id: String,
    way: Way,
    to: SocketAddr,
    count: u32,
    timeout: Duration,
}

/// Answers the requests on standard input.
pub(crate) fn run() -> Result<(), String> {
    let mut requests = VecDeque::new();
    for line in io::stdin().lock().lines() {
        let line = line.map_err(|error| error.to_string())?;
        if !line.trim().is_empty() {
            requests.push_back(parse(&line).ok_or_else(|| format!("not a request: {line}"))?);
        }
    }
    let workers = requests.len().min(WORKERS);
    let queue = Arc::new(Mutex::new(requests));
    let threads: Vec<_> = (0..workers)
        .map(|_| {
            let queue = Arc::clone(&queue);
            thread::spawn(move || work(&queue))
        })
        .collect();
    for thread in threads {
        let outcome = thread.join().map_err(|_panic| "a worker panicked".to_owned())?;
        outcome.map_err(|error| error.to_string())?;
    }
    Ok(())
}

fn parse(line: &str) -> Option<Request> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [id, way, to, count, timeout] = words.as_slice() else { return None };
    let way = match *way {
        "tcp" => Way::Tcp,
        "udp" => Way::Udp,
        "sendto" => Way::SendTo,
        _ => return None,
    };
    Some(Request {
        id: (*id).to_owned(),
        way,
        to: to.parse().ok()?,
        count: count.parse().ok()?,
        timeout: Duration::from_millis(timeout.parse().ok()?),
    })
}

fn work(queue: &Mutex<VecDeque<Request>>) -> io::Result<()> {
    loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let Some(request) = next else { return Ok(()) };
        for _ in 0..request.count {
            let answer = match request.way {
                Way::Tcp => tcp(&request),
                Way::Udp => udp(&request),
                Way::SendTo => send_to(&request),
            };
            writeln!(io::stdout().lock(), "{} {}", request.id, outcome(answer))?;
        }
    }
}

fn outcome(answer: io::Result<String>) -> String {
    let error = match answer {
        Ok(said) => return format!("ok {}", said.trim()),
        Err(error) => error,
    };
    let kind = error.kind();
    let word = if kind == ErrorKind::ConnectionRefused {
        "refused"
    } else if matches!(kind, ErrorKind::TimedOut | ErrorKind::WouldBlock) {
        "timeout"
    } else if matches!(kind, ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable) {
        "unreachable"
    } else {
        "failed"
    };
    format!("{word} {error}")
}

fn tcp(request: &Request) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&request.to, request.timeout)?;
    stream.set_read_timeout(Some(request.timeout))?;
    stream.write_all(b"GET /who HTTP/1.1\r\nHost: probe\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    answer
        .split_once("\r\n\r\n")
        .map(|(_, body)| body.to_owned())
        .ok_or_else(|| io::Error::new(ErrorKind::UnexpectedEof, format!("half an answer: {answer:?}")))
}

fn any(of: SocketAddr) -> SocketAddr {
    match of.ip() {
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

fn udp(request: &Request) -> io::Result<String> {
    let socket = UdpSocket::bind(any(request.to))?;
    socket.connect(request.to)?;
    socket.set_read_timeout(Some(request.timeout))?;
    socket.send(b"who")?;
    let mut buffer = [0_u8; 2048];
    let length = socket.recv(&mut buffer)?;
    Ok(String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned())
}

/// The answer must come from the address that was asked.
fn send_to(request: &Request) -> io::Result<String> {
    let socket = UdpSocket::bind(any(request.to))?;
    socket.set_read_timeout(Some(request.timeout))?;
    socket.send_to(b"who", request.to)?;
    let mut buffer = [0_u8; 2048];
    let (length, from) = socket.recv_from(&mut buffer)?;
    if from != request.to {
        return Err(io::Error::other(format!("answered by {from}")));
    }
    Ok(String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned())
}
