//! A large body over one connection and the same body back, each byte compared.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::Duration;

const PIECE_BYTES: usize = 16_384;

/// Takes one connection and sends back what comes on it; answers who asked.
pub(crate) fn send_back(listener: TcpListener, bytes: usize, patience: Duration) -> JoinHandle<IpAddr> {
    std::thread::spawn(move || {
        let (mut stream, from) = listener.accept().unwrap();
        stream.set_read_timeout(Some(patience)).unwrap();
        stream.set_write_timeout(Some(patience)).unwrap();
        let mut body = vec![0; bytes];
        stream.read_exact(&mut body).unwrap();
        write(&mut stream, &body);
        from.ip()
    })
}

/// Sends a body from the namespace of the calling thread, and reads it back.
pub(crate) fn exchange(to: SocketAddr, bytes: usize, patience: Duration) {
    exchange_over(TcpStream::connect_timeout(&to, patience).unwrap(), bytes, patience);
}

/// The same over a connection that stands.
pub(crate) fn exchange_over(mut stream: TcpStream, bytes: usize, patience: Duration) {
    stream.set_read_timeout(Some(patience)).unwrap();
    stream.set_write_timeout(Some(patience)).unwrap();
    // By whole pieces: byte by byte it takes an emulated machine longer than the way.
    let mut sent = (0..251).collect::<Vec<u8>>().repeat(bytes.div_ceil(251));
    sent.truncate(bytes);
    write(&mut stream, &sent);
    let mut back = vec![0; bytes];
    stream.read_exact(&mut back).unwrap();
    assert!(back == sent, "{stream:?}: another body came back");
}

/// In pieces that fit in the buffer of a socket: what is written to SCTP at once is one message.
fn write(stream: &mut TcpStream, body: &[u8]) {
    for piece in body.chunks(PIECE_BYTES) {
        stream.write_all(piece).unwrap();
    }
}
