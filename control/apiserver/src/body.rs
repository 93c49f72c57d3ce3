//! Owns the bodies of requests and responses.

use bytes::Bytes;
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};

/// An error of a body, type erased.
pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The body of a request or a response.
pub(crate) type Body = UnsyncBoxBody<Bytes, BoxError>;

/// A request as the handlers see it.
pub(crate) type Request = http::Request<Body>;
/// A response as the handlers make it.
pub(crate) type Response = http::Response<Body>;

/// A body of known bytes.
pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// A body without bytes.
pub(crate) fn empty() -> Body {
    full(Bytes::new())
}

/// A body that a stream of chunks makes. It ends with the stream.
pub(crate) fn stream<S>(chunks: S) -> Body
where
    S: futures::Stream<Item = Result<Bytes, BoxError>> + Send + 'static,
{
    use futures::StreamExt;
    StreamBody::new(chunks.map(|chunk| chunk.map(Frame::data))).boxed_unsync()
}

/// A body of several known pieces. Large ones are passed on as they are; small ones are gathered as they are
/// sent, so that a list of many small objects is neither copied as a whole nor sent in a thousand writes.
pub(crate) fn pieces(pieces: Vec<Bytes>) -> Body {
    let left = pieces.iter().map(|p| p.len() as u64).sum();
    BodyExt::boxed_unsync(Pieces { pieces: pieces.into(), left })
}

/// Pieces with a known whole length, so that the response carries `Content-Length`.
struct Pieces {
    pieces: std::collections::VecDeque<Bytes>,
    left: u64,
}

/// Pieces below this size are gathered into chunks of it.
const GATHER_BYTES: usize = 16 * 1024;

impl Pieces {
    fn next_chunk(&mut self) -> Option<Bytes> {
        let first = self.pieces.pop_front()?;
        if first.len() >= GATHER_BYTES || self.pieces.is_empty() {
            return Some(first);
        }
        let mut chunk = bytes::BytesMut::with_capacity(GATHER_BYTES * 2);
        chunk.extend_from_slice(&first);
        while chunk.len() < GATHER_BYTES && self.pieces.front().is_some_and(|p| p.len() < GATHER_BYTES) {
            if let Some(piece) = self.pieces.pop_front() {
                chunk.extend_from_slice(&piece);
            }
        }
        Some(chunk.freeze())
    }
}

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        _cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let chunk = self.next_chunk().map(|chunk| {
            self.left -= chunk.len() as u64;
            Ok(Frame::data(chunk))
        });
        std::task::Poll::Ready(chunk)
    }

    fn is_end_stream(&self) -> bool {
        self.pieces.is_empty()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        http_body::SizeHint::with_exact(self.left)
    }
}

/// Why a body couldn't be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    /// The body is over the bound.
    #[error("the body is over {limit_bytes} bytes")]
    TooLarge {
        /// The bound.
        limit_bytes: usize,
    },
    /// The client went away or broke the protocol.
    #[error("the body couldn't be read")]
    Broken(#[source] BoxError),
}

/// Reads a whole body of at most `limit_bytes`.
pub(crate) async fn read(mut body: Body, limit_bytes: usize) -> Result<Bytes, ReadError> {
    let mut chunks: Vec<Bytes> = Vec::new();
    let mut length = 0;
    while let Some(frame) = body.frame().await {
        let Ok(chunk) = frame.map_err(ReadError::Broken)?.into_data() else { continue };
        length += chunk.len();
        if length > limit_bytes {
            return Err(ReadError::TooLarge { limit_bytes });
        }
        chunks.push(chunk);
    }
    match chunks.len() {
        0 => Ok(Bytes::new()),
        1 => Ok(chunks.swap_remove(0)),
        _ => Ok(chunks.concat().into()),
    }
}
