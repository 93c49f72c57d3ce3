//! Owns the body of a page whose links are changed on its way, as it comes.

use std::io::{self, Write};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use flate2::Compression;
use flate2::write::{GzEncoder, MultiGzDecoder, ZlibDecoder, ZlibEncoder};
use http::HeaderMap;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use http_body::Frame;
use http_body_util::BodyExt as _;

use super::links::{Links, Way};
use crate::body::{Body, BoxError, Response};

/// Takes the bytes of a body as they come, and has those that go on.
trait Stage: Send {
    fn next(&mut self, chunk: &[u8]) -> io::Result<Vec<u8>>;
    fn last(&mut self) -> io::Result<Vec<u8>>;
}

/// How a writer that may hold bytes back gives them all, and is asked for those below it.
struct Coded<W> {
    /// `None` once it has ended.
    writer: Option<W>,
    out: fn(&mut W) -> &mut Vec<u8>,
    end: fn(W) -> io::Result<Vec<u8>>,
}

impl<W: Write + Send> Stage for Coded<W> {
    fn next(&mut self, chunk: &[u8]) -> io::Result<Vec<u8>> {
        let Some(writer) = &mut self.writer else { return Ok(Vec::new()) };
        writer.write_all(chunk)?;
        writer.flush()?;
        Ok(std::mem::take((self.out)(writer)))
    }

    fn last(&mut self) -> io::Result<Vec<u8>> {
        self.writer.take().map_or_else(|| Ok(Vec::new()), self.end)
    }
}

/// The stage for a coding of content; `None` for one that is not known.
fn stage(coding: &str, way: Way) -> Option<Box<dyn Stage>> {
    match coding {
        "" | "identity" => Some(Box::new(Coded {
            writer: Some(Links::new(Vec::new(), way)),
            out: |links| links.get_mut(),
            end: |links| links.end(),
        })),
        "gzip" => Some(Box::new(Coded {
            writer: Some(MultiGzDecoder::new(Links::new(
                GzEncoder::new(Vec::new(), Compression::fast()),
                way,
            ))),
            out: |decoder| decoder.get_mut().get_mut().get_mut(),
            end: |decoder| decoder.finish()?.end()?.finish(),
        })),
        "deflate" => Some(Box::new(Coded {
            writer: Some(ZlibDecoder::new(Links::new(
                ZlibEncoder::new(Vec::new(), Compression::fast()),
                way,
            ))),
            out: |decoder| decoder.get_mut().get_mut().get_mut(),
            end: |decoder| decoder.finish()?.end()?.finish(),
        })),
        _ => None,
    }
}

/// A page's body on its way.
struct Page {
    from: Body,
    stage: Box<dyn Stage>,
    is_ended: bool,
}

impl Page {
    fn end(&mut self) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.is_ended = true;
        Poll::Ready(match self.stage.last() {
            Ok(rest) if rest.is_empty() => None,
            Ok(rest) => Some(Ok(Frame::data(rest.into()))),
            Err(error) => Some(Err(error.into())),
        })
    }
}

impl http_body::Body for Page {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        loop {
            if self.is_ended {
                return Poll::Ready(None);
            }
            let Some(frame) = ready!(Pin::new(&mut self.from).poll_frame(cx)) else { return self.end() };
            // Trailers tell of the body as it was.
            let Ok(chunk) = frame?.into_data() else { continue };
            let changed = self.stage.next(&chunk)?;
            if !changed.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(changed.into()))));
            }
        }
    }
}

/// Leads the links of a response through the proxy, if it is a page.
pub(super) fn lead(response: Response, way: Way) -> Response {
    if !is_page(response.headers()) {
        return response;
    }
    let coding = response.headers().get(CONTENT_ENCODING).map_or(Ok(""), |coding| coding.to_str());
    let Some(stage) = coding.ok().and_then(|coding| stage(coding, way)) else { return response };
    let (mut head, from) = response.into_parts();
    head.headers.remove(CONTENT_LENGTH);
    Response::from_parts(head, Page { from, stage, is_ended: false }.boxed_unsync())
}

fn is_page(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("text/html")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    const PAGE: &[u8] = b"<a href=\"/x\">t</a>";
    const CHANGED: &str = "<a href=\"/p/x\">t</a>";

    async fn sent(kind: &'static str, coding: &'static str, body: Vec<u8>) -> (bool, Vec<u8>) {
        let length = body.len();
        let chunks = body.chunks(5).map(|chunk| Ok(Bytes::copy_from_slice(chunk))).collect::<Vec<_>>();
        let mut response = Response::new(crate::body::stream(futures::stream::iter(chunks)));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, http::HeaderValue::from_static(kind));
        headers.insert(CONTENT_LENGTH, length.into());
        if !coding.is_empty() {
            headers.insert(CONTENT_ENCODING, http::HeaderValue::from_static(coding));
        }
        let response = lead(response, Way { prefix: "/p".to_owned(), asked: None, backend: None });
        let has_length = response.headers().contains_key(CONTENT_LENGTH);
        (has_length, response.into_body().collect().await.expect("a body").to_bytes().to_vec())
    }

    #[tokio::test]
    async fn pages_of_every_coding_are_changed_and_nothing_else() {
        let plain = sent("text/html; charset=utf-8", "", PAGE.to_vec()).await;
        assert_eq!(plain, (false, CHANGED.into()));
        assert_eq!(sent("text/plain", "", PAGE.to_vec()).await, (true, PAGE.to_vec()));
        assert_eq!(sent("text/html", "br", PAGE.to_vec()).await, (true, PAGE.to_vec()));

        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(PAGE).expect("a Vec takes all");
        let mut body = encoder.finish().expect("a Vec takes all");
        // RFC 1952 §2.2: a file is a series of members.
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(b"</p>").expect("a Vec takes all");
        body.extend(encoder.finish().expect("a Vec takes all"));
        let (_, body) = sent("text/html", "gzip", body).await;
        let mut text = String::new();
        flate2::read::GzDecoder::new(&body[..]).read_to_string(&mut text).expect("gzip");
        assert_eq!(text, format!("{CHANGED}</p>"));

        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(PAGE).expect("a Vec takes all");
        let (_, body) = sent("text/html", "deflate", encoder.finish().expect("a Vec takes all")).await;
        let mut text = String::new();
        flate2::read::ZlibDecoder::new(&body[..]).read_to_string(&mut text).expect("zlib");
        assert_eq!(text, CHANGED);
    }
}
