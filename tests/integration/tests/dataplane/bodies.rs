//! A large body over one connection and the same body back, each byte compared.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::Duration;

/// Takes one connection and sends back what comes on it; answers who asked.
pub(crate) fn send_back(listener: TcpListener, bytes: usize, patience: Duration) -> JoinHandle<IpAddr> {
    std::thread::spawn(move || {
        let (mut stream, from) = listener.accept().unwrap();
        stream.set_read_timeout(Some(patience)).unwrap();
        stream.set_write_timeout(Some(patience)).unwrap();
        let mut body = vec![0; bytes];
        stream.read_exact(&mut body).unwrap();
        stream.write_all(&body).unwrap();
        from.ip()
    })
}

/// Sends a body from the namespace of the calling thread, and reads it back.
pub(crate) fn exchange(to: SocketAddr, bytes: usize, patience: Duration) {
    // Made before anybody waits for it, and by whole pieces: byte by byte it takes an emulated machine longer than the way.
    let mut sent = (0..251).collect::<Vec<u8>>().repeat(bytes.div_ceil(251));
    sent.truncate(bytes);
    let mut stream = TcpStream::connect_timeout(&to, patience).unwrap();
    stream.set_read_timeout(Some(patience)).unwrap();
    stream.set_write_timeout(Some(patience)).unwrap();
    stream.write_all(&sent).unwrap();
    let mut back = vec![0; bytes];
    stream.read_exact(&mut back).unwrap();
    assert!(back == sent, "{to}: another body came back");
}
