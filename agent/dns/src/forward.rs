//! Names outside the cluster: the query goes on to the node's own resolvers as it came, and so does the reply.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

/// How long one resolver may take before the next is asked; a stub resolver gives up after 5 s.
const PATIENCE: Duration = Duration::from_secs(2);
/// Largest datagram that is taken from a resolver: what EDNS may announce at the most.
const DATAGRAM_BYTES: usize = 65_535;

/// Asks the upstream resolvers in order.
#[derive(Clone, Debug)]
pub(crate) struct Forwarder {
    upstreams: Vec<SocketAddr>,
}

impl Forwarder {
    pub(crate) fn new(upstreams: Vec<SocketAddr>) -> Self {
        Self { upstreams }
    }

    /// The first resolver's reply to `query`, over the transport that the client used; `None` if none replied.
    pub(crate) async fn ask(&self, query: &[u8], over_tcp: bool) -> Option<Vec<u8>> {
        for upstream in &self.upstreams {
            let asked = async {
                if over_tcp { ask_tcp(*upstream, query).await } else { ask_udp(*upstream, query).await }
            };
            match timeout(PATIENCE, asked).await {
                Ok(Ok(reply)) => return Some(reply),
                Ok(Err(error)) => tracing::debug!(%upstream, %error, "a resolver refused"),
                Err(_) => tracing::debug!(%upstream, "a resolver didn't reply in time"),
            }
        }
        None
    }
}

/// A socket of its own for each query: its random port and the id together make a forged reply improbable.
async fn ask_udp(upstream: SocketAddr, query: &[u8]) -> std::io::Result<Vec<u8>> {
    let any: SocketAddr = if upstream.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(upstream).await?;
    socket.send(query).await?;
    let mut reply = vec![0; DATAGRAM_BYTES];
    loop {
        let length = socket.recv(&mut reply).await?;
        if length >= 2 && reply[..2] == query[..2] {
            reply.truncate(length);
            return Ok(reply);
        }
    }
}

async fn ask_tcp(upstream: SocketAddr, query: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(upstream).await?;
    write_message(&mut stream, query).await?;
    read_message(&mut stream).await?.ok_or_else(|| std::io::ErrorKind::UnexpectedEof.into())
}

/// Reads one message with its two bytes of length (RFC 1035 §4.2.2); `None` at the end of the stream.
pub(crate) async fn read_message(stream: &mut TcpStream) -> std::io::Result<Option<Vec<u8>>> {
    let length = match stream.read_u16().await {
        Ok(length) => usize::from(length),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut message = vec![0; length];
    stream.read_exact(&mut message).await?;
    Ok(Some(message))
}

/// Writes one message with its length.
pub(crate) async fn write_message(stream: &mut TcpStream, message: &[u8]) -> std::io::Result<()> {
    let length = u16::try_from(message.len()).map_err(std::io::Error::other)?;
    let mut framed = Vec::with_capacity(message.len() + 2);
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(message);
    stream.write_all(&framed).await
}
