//! What the fuzzer feeds: methods, paths and queries of requests.

use http::Method;

use crate::request_info::{Query, RequestInfo};

/// Reads a request line as the first step of every request; whether it is about a resource.
pub fn request(method: &Method, path: &str, query: &str) -> bool {
    let query = Query::parse(Some(query));
    let info = RequestInfo::parse(method, path, &query);
    assert_eq!(info.path, path);
    assert!(!info.named || !info.name.is_empty());
    assert!(info.is_resource || (info.group.is_empty() && info.resource.is_empty() && info.name.is_empty()));
    let reads = info.is_resource && info.is_read_only();
    assert!(!reads || [Method::GET, Method::HEAD].contains(method) || info.verb == "watch", "{info:?}");
    info.is_resource
}
