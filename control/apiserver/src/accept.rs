//! Owns content negotiation: which shape of answer a client wants.

use http::HeaderMap;
use weft_control_api::status::Status;

/// The shape of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// The object or list itself.
    Object,
    /// A `meta.k8s.io` Table, by its version.
    Table(&'static str),
    /// `PartialObjectMetadata` or its list.
    Metadata,
    /// Aggregated discovery, by its version.
    Discovery(&'static str),
}

/// What is accepted where only plain objects are served.
const JSON: &str = "application/json";

struct Clause<'a> {
    media: &'a str,
    group: Option<&'a str>,
    version: Option<&'a str>,
    shape: Option<&'a str>,
}

fn clauses(accept: &str) -> impl Iterator<Item = Clause<'_>> {
    accept.split(',').map(|clause| {
        let mut parts = clause.split(';').map(str::trim);
        let media = parts.next().unwrap_or_default();
        let mut clause = Clause { media, group: None, version: None, shape: None };
        for part in parts {
            match part.split_once('=') {
                Some(("g", value)) => clause.group = Some(value),
                Some(("v", value)) => clause.version = Some(value),
                Some(("as", value)) => clause.shape = Some(value),
                _ => {}
            }
        }
        clause
    })
}

impl Clause<'_> {
    fn is_json(&self) -> bool {
        matches!(self.media, JSON | "application/*" | "*/*")
    }

    fn shape(&self) -> Option<Shape> {
        let version = |wanted: &[&'static str]| wanted.iter().copied().find(|v| Some(*v) == self.version);
        match (self.shape, self.group) {
            (None, _) => Some(Shape::Object),
            (Some("Table"), Some("meta.k8s.io")) => version(&["v1", "v1beta1"]).map(Shape::Table),
            (Some("PartialObjectMetadata" | "PartialObjectMetadataList"), Some("meta.k8s.io")) => {
                version(&["v1"]).map(|_| Shape::Metadata)
            }
            (Some("APIGroupDiscoveryList"), Some("apidiscovery.k8s.io")) => {
                version(&["v2", "v2beta1"]).map(Shape::Discovery)
            }
            _ => None,
        }
    }
}

/// Picks the first acceptable shape among those that `serves` allows.
pub(crate) fn negotiate(headers: &HeaderMap, serves: impl Fn(Shape) -> bool) -> Result<Shape, Status> {
    let mut asked = false;
    for value in headers.get_all(http::header::ACCEPT) {
        let Ok(text) = value.to_str() else { continue };
        asked = asked || !text.trim().is_empty();
        for clause in clauses(text) {
            if let (true, Some(shape)) = (clause.is_json(), clause.shape())
                && serves(shape)
            {
                return Ok(shape);
            }
        }
    }
    if asked { Err(Status::not_acceptable(&[JSON])) } else { Ok(Shape::Object) }
}

/// Whether the client takes gzip.
pub(crate) fn takes_gzip(headers: &HeaderMap) -> bool {
    headers
        .get_all(http::header::ACCEPT_ENCODING)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|coding| coding.split(';').next().is_some_and(|name| name.trim() == "gzip"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(accept: &str) -> Result<Shape, u16> {
        let mut headers = HeaderMap::new();
        if !accept.is_empty() {
            headers.insert(http::header::ACCEPT, accept.parse().unwrap());
        }
        negotiate(&headers, |shape| !matches!(shape, Shape::Discovery(_))).map_err(|s| s.code())
    }

    #[test]
    fn clients() {
        let kubectl = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        assert_eq!(shape(kubectl), Ok(Shape::Table("v1")));
        assert_eq!(shape("application/vnd.kubernetes.protobuf,application/json"), Ok(Shape::Object));
        assert_eq!(shape(""), Ok(Shape::Object));
        assert_eq!(shape("*/*"), Ok(Shape::Object));
        assert_eq!(
            shape("application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"),
            Ok(Shape::Metadata)
        );
        assert_eq!(shape("application/vnd.kubernetes.protobuf"), Err(406));
        assert_eq!(shape("text/html"), Err(406));
    }
}
