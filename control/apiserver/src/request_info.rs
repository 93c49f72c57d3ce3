//! Owns the reading of a path and a method as a request for a resource, by upstream's rules.

use http::Method;
use std::collections::HashMap;

/// What a request asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RequestInfo {
    /// Whether the path names an API resource.
    pub(crate) is_resource: bool,
    /// The whole path.
    pub(crate) path: String,
    /// The verb of authorization: get, list, watch, create, … or the lower-case method.
    pub(crate) verb: String,
    /// The API group; empty for the core.
    pub(crate) group: String,
    /// The API version.
    pub(crate) version: String,
    /// The namespace; empty for cluster scope.
    pub(crate) namespace: String,
    /// The resource's plural.
    pub(crate) resource: String,
    /// The subresource, if any.
    pub(crate) subresource: String,
    /// The object's name, if any.
    pub(crate) name: String,
    /// Whether the path, rather than a field selector, names the object.
    pub(crate) named: bool,
}

/// Subresources of a namespace; everything else after its name is a resource within it.
const NAMESPACE_SUBRESOURCES: [&str; 2] = ["status", "finalize"];

impl RequestInfo {
    /// Reads a request. `query` decides between list and watch.
    pub(crate) fn parse(method: &Method, path: &str, query: &Query) -> Self {
        let mut info =
            Self { path: path.to_owned(), verb: method.as_str().to_lowercase(), ..Self::default() };
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let rest = match parts.as_slice() {
            ["api", version, rest @ ..] if !rest.is_empty() => {
                info.version = (*version).to_owned();
                rest
            }
            ["apis", group, version, rest @ ..] if !rest.is_empty() => {
                info.group = (*group).to_owned();
                info.version = (*version).to_owned();
                rest
            }
            _ => return info,
        };
        info.is_resource = true;
        info.verb = verb_of(method).to_owned();
        let rest = info.strip_watch(rest);
        info.read_resource(rest);
        info.refine_verb(query);
        info
    }

    /// The deprecated `/api/v1/watch/…`.
    fn strip_watch<'a>(&mut self, rest: &'a [&'a str]) -> &'a [&'a str] {
        if let ["watch", tail @ ..] = rest
            && !tail.is_empty()
        {
            "watch".clone_into(&mut self.verb);
            return tail;
        }
        rest
    }

    fn read_resource(&mut self, rest: &[&str]) {
        let rest = match rest {
            ["namespaces", ns, tail @ ..] => {
                (*ns).clone_into(&mut self.namespace);
                match tail {
                    [] => rest,
                    [sub, ..] if NAMESPACE_SUBRESOURCES.contains(sub) => rest,
                    tail => tail,
                }
            }
            other => other,
        };
        if let Some(resource) = rest.first() {
            (*resource).clone_into(&mut self.resource);
        }
        if let Some(name) = rest.get(1) {
            self.name = percent_decode(name);
        }
        if let Some(subresource) = rest.get(2) {
            (*subresource).clone_into(&mut self.subresource);
        }
        self.named = !self.name.is_empty();
    }

    fn refine_verb(&mut self, query: &Query) {
        if self.name.is_empty() && self.verb == "get" {
            self.verb = if query.flag("watch") { "watch" } else { "list" }.to_owned();
        }
        if self.name.is_empty() && self.verb == "delete" {
            "deletecollection".clone_into(&mut self.verb);
        }
        // A list or watch of one object by field selector is authorized by the object's name.
        if matches!(self.verb.as_str(), "list" | "watch")
            && self.name.is_empty()
            && let Some(selector) = query.get("fieldSelector")
        {
            let named = selector.split(',').find_map(|term| {
                term.strip_prefix("metadata.name==").or_else(|| term.strip_prefix("metadata.name="))
            });
            if let Some(name) = named {
                name.clone_into(&mut self.name);
            }
        }
    }

    /// Whether the request changes nothing.
    pub(crate) fn is_read_only(&self) -> bool {
        matches!(self.verb.as_str(), "get" | "list" | "watch" | "head" | "options")
    }
}

fn verb_of(method: &Method) -> &'static str {
    match *method {
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        Method::GET | Method::HEAD => "get",
        _ => "",
    }
}

fn percent_decode(text: &str) -> String {
    if !text.contains('%') {
        return text.to_owned();
    }
    // A path segment has no '+' for a space, so that is protected from form decoding.
    let protected = text.replace('+', "%2B");
    form_urlencoded::parse(protected.as_bytes()).next().map(|(k, _)| k.into_owned()).unwrap_or_default()
}

/// The query of a request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Query {
    values: HashMap<String, Vec<String>>,
}

impl Query {
    /// Reads a query string.
    pub(crate) fn parse(raw: Option<&str>) -> Self {
        let raw = raw.unwrap_or_default();
        let mut values: HashMap<String, Vec<String>> = HashMap::new();
        for (key, value) in form_urlencoded::parse(raw.as_bytes()) {
            values.entry(key.into_owned()).or_default().push(value.into_owned());
        }
        Self { values }
    }

    /// The first value of a parameter; an empty one counts as absent.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.values.get(key)?.first().map(String::as_str).filter(|v| !v.is_empty())
    }

    /// All values of a parameter.
    pub(crate) fn all(&self, key: &str) -> &[String] {
        self.values.get(key).map(Vec::as_slice).unwrap_or_default()
    }

    /// A boolean parameter, read as upstream does: present and neither `false` nor `0` is true.
    pub(crate) fn flag(&self, key: &str) -> bool {
        self.values.get(key).and_then(|v| v.first()).is_some_and(|v| !v.eq_ignore_ascii_case("false") && v != "0")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(method: Method, path: &str, query: &str) -> RequestInfo {
        RequestInfo::parse(&method, path, &Query::parse(Some(query)))
    }

    fn row(i: &RequestInfo) -> [&str; 6] {
        [&i.verb, &i.group, &i.namespace, &i.resource, &i.subresource, &i.name]
    }

    #[test]
    fn upstream_rows() {
        let ns = "/api/v1/namespaces";
        assert_eq!(row(&info(Method::GET, ns, "")), ["list", "", "", "namespaces", "", ""]);
        let i = info(Method::GET, "/api/v1/namespaces/other", "");
        assert_eq!(row(&i), ["get", "", "other", "namespaces", "", "other"]);
        let i = info(Method::GET, "/api/v1/namespaces/other/pods", "");
        assert_eq!(row(&i), ["list", "", "other", "pods", "", ""]);
        let i = info(Method::GET, "/api/v1/namespaces/other/pods/foo", "");
        assert_eq!(row(&i), ["get", "", "other", "pods", "", "foo"]);
        assert_eq!(info(Method::GET, "/api/v1/pods", "watch=False").verb, "list");
        let i = info(Method::GET, "/api/v1/pods", "watch=true");
        assert_eq!(row(&i), ["watch", "", "", "pods", "", ""]);
        let i = info(Method::GET, "/api/v1/watch/namespaces/other/pods", "");
        assert_eq!(row(&i), ["watch", "", "other", "pods", "", ""]);
        let i = info(Method::PUT, "/api/v1/namespaces/other/finalize", "");
        assert_eq!(row(&i), ["update", "", "other", "namespaces", "finalize", "other"]);
        let i = info(Method::DELETE, "/apis/apps/v1/namespaces/other/deployments", "");
        assert_eq!(row(&i), ["deletecollection", "apps", "other", "deployments", "", ""]);
        let i = info(Method::POST, "/api/v1/namespaces/other/pods/foo/exec", "");
        assert_eq!(row(&i), ["create", "", "other", "pods", "exec", "foo"]);
        let i = info(Method::GET, "/api/v1/namespaces/o/secrets", "fieldSelector=metadata.name%3Dfoo");
        assert_eq!(row(&i), ["list", "", "o", "secrets", "", "foo"]);
    }

    #[test]
    fn other_paths() {
        assert!(!info(Method::GET, "/", "").is_resource);
        assert!(!info(Method::GET, "/healthz", "").is_resource);
        assert!(!info(Method::GET, "/apis/apps/v1", "").is_resource);
        assert_eq!(info(Method::GET, "/version", "").verb, "get");
    }
}
