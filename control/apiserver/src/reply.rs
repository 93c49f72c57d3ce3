//! Owns how answers are put into HTTP responses.

use crate::body::{self, Response};
use bytes::Bytes;
use http::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderValue, RETRY_AFTER, VARY, WWW_AUTHENTICATE};
use http::{HeaderMap, StatusCode};
use weft_control_api::status::Status;

const JSON: HeaderValue = HeaderValue::from_static("application/json");
/// Below this the gain isn't worth the time; upstream's bound.
const GZIP_FROM_BYTES: usize = 128 * 1024;

/// A JSON answer.
pub(crate) fn json(code: StatusCode, bytes: Bytes) -> Response {
    let mut response = Response::new(body::full(bytes));
    *response.status_mut() = code;
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    response
}

/// A JSON answer made of pieces, compressed if it is large and the client takes that.
pub(crate) fn json_pieces(pieces: Vec<Bytes>, gzip: bool) -> Response {
    let length: usize = pieces.iter().map(Bytes::len).sum();
    let packed = (gzip && length >= GZIP_FROM_BYTES).then(|| compress(&pieces)).flatten();
    let mut response = match packed {
        Some(packed) => {
            let mut response = Response::new(body::full(packed));
            response.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            response.headers_mut().insert(VARY, HeaderValue::from_static("Accept-Encoding"));
            response
        }
        None => Response::new(body::pieces(pieces)),
    };
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    response
}

fn compress(pieces: &[Bytes]) -> Option<Bytes> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    for piece in pieces {
        encoder.write_all(piece).ok()?;
    }
    encoder.finish().ok().map(Bytes::from)
}

/// A plain text answer.
pub(crate) fn text(code: StatusCode, text: impl Into<Bytes>) -> Response {
    let mut response = Response::new(body::full(text.into()));
    *response.status_mut() = code;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response.headers_mut().insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    response
}

/// The answer that a failure makes.
pub(crate) fn status(status: &Status) -> Response {
    let code = StatusCode::from_u16(status.code()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = json(code, status.to_json());
    let retry = status.details.as_ref().and_then(|details| details.retry_after_seconds);
    if let Some(seconds) = retry {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    if code == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

/// Adds `Warning: 299` headers.
pub(crate) fn warn(headers: &mut HeaderMap, warnings: &[String]) {
    for warning in warnings {
        let quoted = warning.replace('\\', "\\\\").replace('"', "\\\"");
        if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{quoted}\"")) {
            headers.append(http::header::WARNING, value);
        }
    }
}
