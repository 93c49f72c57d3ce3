//! A request from the node itself: what a process on the host gets from an address.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Longest wait for the connection, and for the answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// As much of an answer as is read.
const MAX_ANSWER_BYTES: u64 = 4_096;

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Probed {
    /// The body of the answer.
    Answer(String),
    /// Why there is none.
    Failed(String),
}

/// Asks for `/hostname` over HTTP, from the network namespace of the calling thread.
pub(crate) fn ask(to: SocketAddr) -> Probed {
    match fetch(to) {
        Ok(answer) => match answer.split_once("\r\n\r\n") {
            Some((head, body)) if head.starts_with("HTTP/1.") && head.contains(" 200 ") => {
                Probed::Answer(body.trim().to_owned())
            }
            _ => Probed::Failed(format!("no HTTP answer: {:?}", answer.lines().next().unwrap_or_default())),
        },
        Err(error) => Probed::Failed(error.to_string()),
    }
}

fn fetch(to: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(format!("GET /hostname HTTP/1.0\r\nHost: {to}\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER_BYTES).read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}
