//! The server: one line that says who answers, who asked, which address was asked, and what for.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

/// Connections served at a time; more wait in the kernel's queue.
const MAX_CONNECTIONS: u32 = 256;
/// A client that says nothing for so long is let go.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest body that is read.
const MAX_BODY_BYTES: u64 = 1 << 20;

/// Serves every port of `ports` until killed.
pub(crate) fn run(ports: &[&str]) -> Result<(), String> {
    let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").map_err(|error| error.to_string())?;
    let mut threads = Vec::new();
    for port in ports {
        let (number, rest) = port.split_once('/').ok_or_else(|| format!("no protocol: {port}"))?;
        let number: u16 = number.parse().map_err(|error| format!("{port}: {error}"))?;
        let (protocol, name) = rest.split_once('=').unwrap_or((rest, hostname.trim()));
        let name: Arc<str> = name.into();
        let server: Box<dyn FnOnce() + Send> = match protocol {
            "tcp" => {
                let listener = listen(number)?;
                Box::new(move || tcp(&listener, &name))
            }
            "udp" => {
                let socket = bind(number)?;
                Box::new(move || udp(&socket, &name))
            }
            _ => return Err(format!("unknown protocol: {port}")),
        };
        threads.push(thread::spawn(server));
    }
    for thread in threads {
        thread.join().map_err(|_panic| "a server panicked".to_owned())?;
    }
    Ok(())
}

/// Both families by one socket, or IPv4 alone where the kernel has no IPv6.
fn wildcards(port: u16) -> [SocketAddr; 2] {
    [(Ipv6Addr::UNSPECIFIED, port).into(), (Ipv4Addr::UNSPECIFIED, port).into()]
}

fn listen(port: u16) -> Result<TcpListener, String> {
    TcpListener::bind(&wildcards(port)[..]).map_err(|error| format!("cannot listen on {port}/tcp: {error}"))
}

fn bind(port: u16) -> Result<UdpSocket, String> {
    UdpSocket::bind(&wildcards(port)[..]).map_err(|error| format!("cannot listen on {port}/udp: {error}"))
}

/// Without the mapping of IPv4 into IPv6 that a socket of both families shows.
fn plain(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V6(v6) => v6.to_canonical(),
        v4 @ IpAddr::V4(_) => v4,
    };
    (ip, address.port()).into()
}

fn udp(socket: &UdpSocket, name: &str) {
    let mut buffer = [0_u8; 2048];
    loop {
        // An error of an earlier answer (its client is gone) shows here; the next request is not concerned.
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        let asked = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
        let answer = format!("{name} {} - UDP {}\n", plain(from), asked.trim());
        let _ = socket.send_to(answer.as_bytes(), from);
    }
}

fn tcp(listener: &TcpListener, name: &Arc<str>) {
    let open = Arc::new(AtomicU32::new(0));
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        while open.load(Ordering::Relaxed) >= MAX_CONNECTIONS {
            thread::yield_now();
        }
        open.fetch_add(1, Ordering::Relaxed);
        let (name, open) = (Arc::clone(name), Arc::clone(&open));
        thread::spawn(move || {
            // The client went away: nobody is left to tell.
            let _ = http(&stream, &name);
            open.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

/// One HTTP request. `/hostname` is answered with the name alone, `/echo` with the request's body, `/code/NNN` with that
/// status, anything else with the whole line.
fn http(stream: &TcpStream, name: &str) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let (peer, local) = (plain(stream.peer_addr()?), plain(stream.local_addr()?));
    let mut reader = BufReader::new(stream);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut words = request.split_whitespace();
    let (method, path) = (words.next().unwrap_or("-"), words.next().unwrap_or("-"));
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        if let Some((key, value)) = line.split_once(':')
            && key.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().unwrap_or(0);
        }
    }
    let mut sent = Vec::new();
    reader.by_ref().take(length.min(MAX_BODY_BYTES)).read_to_end(&mut sent)?;
    let code = path.split_once("/code/").map_or("200", |(_, code)| code);
    let body = match path {
        "/hostname" => format!("{name}\n").into_bytes(),
        "/echo" => sent,
        _ => format!("{name} {peer} {local} {method} {path}\n").into_bytes(),
    };
    let head = format!(
        "HTTP/1.1 {code} -\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let mut writer = stream;
    writer.write_all(head.as_bytes())?;
    if method != "HEAD" {
        writer.write_all(&body)?;
    }
    writer.flush()
}
