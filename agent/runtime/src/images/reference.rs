//! Image references: `nginx` is `docker.io/library/nginx:latest`.

use std::fmt;

const DEFAULT_DOMAIN: &str = "docker.io";
const DEFAULT_TAG: &str = "latest";
const MAX_NAME_BYTES: usize = 255;
const MAX_TAG_BYTES: usize = 128;

/// A reference in full: domain, path, tag or digest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reference {
    /// Domain and path: `docker.io/library/nginx`.
    pub name: String,
    /// Tag; `None` only beside a digest.
    pub tag: Option<String>,
    /// `sha256:…` of a manifest.
    pub digest: Option<String>,
}

impl Reference {
    /// Parses and completes a reference; `None` if it is none.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest_of(digest)?)),
            None => (text, None),
        };
        let last = rest.rfind('/').map_or(0, |slash| slash + 1);
        let (name, tag) = match rest[last..].find(':') {
            Some(colon) => (&rest[..last + colon], Some(&rest[last + colon + 1..])),
            None => (rest, None),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return None;
        }
        let name = full_name(name)?;
        let tag = tag.map(str::to_owned).or_else(|| digest.is_none().then(|| DEFAULT_TAG.to_owned()));
        Some(Self { name, tag, digest })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        self.digest.iter().try_for_each(|digest| write!(f, "@{digest}"))
    }
}

/// The hexadecimal digits of a `sha256:` digest.
#[must_use]
pub(super) fn digest_hex(digest: &str) -> Option<&str> {
    let hex = digest.strip_prefix("sha256:")?;
    let plain = hex.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    (hex.len() == 64 && plain).then_some(hex)
}

fn digest_of(text: &str) -> Option<String> {
    digest_hex(text).map(|_| text.to_owned())
}

fn is_tag(tag: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let mut bytes = tag.bytes();
    bytes.next().is_some_and(word)
        && tag.len() <= MAX_TAG_BYTES
        && bytes.all(|byte| word(byte) || matches!(byte, b'.' | b'-'))
}

fn full_name(name: &str) -> Option<String> {
    let (domain, path) = match name.split_once('/') {
        Some((first, path)) if first.contains(['.', ':']) || first == "localhost" => (first, path.to_owned()),
        _ => (DEFAULT_DOMAIN, name.to_owned()),
    };
    let domain = if domain == "index.docker.io" { DEFAULT_DOMAIN } else { domain };
    let path = if domain == DEFAULT_DOMAIN && !path.contains('/') { format!("library/{path}") } else { path };
    let fits = domain.len() + 1 + path.len() <= MAX_NAME_BYTES;
    (fits && is_domain(domain) && path.split('/').all(is_component)).then(|| format!("{domain}/{path}"))
}

fn is_domain(domain: &str) -> bool {
    let (host, port) = domain.split_once(':').unwrap_or((domain, "0"));
    let fine = |part: &str| {
        !part.is_empty()
            && !part.starts_with('-')
            && !part.ends_with('-')
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    host.split('.').all(fine) && !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit())
}

/// Lower case and digits, joined by `.`, `_`, `__` or any number of `-`.
fn is_component(component: &str) -> bool {
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = component.as_bytes();
    let ends =
        bytes.first().is_some_and(|b| alphanumeric(*b)) && bytes.last().is_some_and(|b| alphanumeric(*b));
    let separators = component.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    ends && separators
        .into_iter()
        .all(|s| matches!(s, "" | "." | "_" | "__") || s.bytes().all(|byte| byte == b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(text: &str) -> Option<String> {
        Reference::parse(text).map(|reference| reference.to_string())
    }

    #[test]
    fn short_names_are_completed() {
        let digest = format!("sha256:{}", "a1".repeat(32));
        for (short, long) in [
            ("nginx", "docker.io/library/nginx:latest".to_owned()),
            ("nginx:1.22", "docker.io/library/nginx:1.22".to_owned()),
            ("me/app", "docker.io/me/app:latest".to_owned()),
            ("index.docker.io/nginx", "docker.io/library/nginx:latest".to_owned()),
            ("localhost/app:v1", "localhost/app:v1".to_owned()),
            ("registry.k8s.io/pause:3.9", "registry.k8s.io/pause:3.9".to_owned()),
            ("host:5000/a/b", "host:5000/a/b:latest".to_owned()),
            (&format!("nginx@{digest}"), format!("docker.io/library/nginx@{digest}")),
            (&format!("nginx:1@{digest}"), format!("docker.io/library/nginx:1@{digest}")),
        ] {
            assert_eq!(full(short), Some(long), "{short}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            "",
            "UPPER",
            "a b",
            "a:",
            "a:-x",
            "a//b",
            "a/../b",
            "nginx@sha256:12",
            "a@md5:00",
            ".a",
            "a___b",
            "/a",
        ] {
            assert_eq!(full(bad), None, "{bad}");
        }
    }
}
