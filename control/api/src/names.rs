//! Rules for names, labels, ports and addresses. Each function returns what is wrong, in upstream's words; nothing if all is well.
use std::net::IpAddr;

/// What is wrong with a value; empty if nothing is.
pub type Problems = Vec<String>;

/// Most bytes of a DNS label, a label's value and the name part of a qualified name.
pub const LABEL_MAX_BYTES: usize = 63;
/// Most bytes of a DNS subdomain.
pub const SUBDOMAIN_MAX_BYTES: usize = 253;
const PORT_NAME_MAX_BYTES: usize = 15;

const LABEL_FMT: &str = "[a-z0-9]([-a-z0-9]*[a-z0-9])?";
const SUBDOMAIN_FMT: &str = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*";

fn regex_error(message: &str, format: &str, examples: &[&str]) -> String {
    let mut text = message.to_owned();
    if examples.is_empty() {
        text.extend([" (regex used for validation is '", format, "')"]);
        return text;
    }
    text.push_str(" (e.g. ");
    for (at, example) in examples.iter().enumerate() {
        text.extend([if at > 0 { " or '" } else { "'" }, example, "', "]);
    }
    text.extend(["regex used for validation is '", format, "')"]);
    text
}

/// The message for a value of more than `max` bytes.
pub fn max_len_error(max: usize) -> String {
    format!("must be no more than {max} characters")
}

/// The message for a number outside a range.
pub fn range_error(low: i64, high: i64) -> String {
    format!("must be between {low} and {high}, inclusive")
}

/// Whether the text is not empty, begins and ends with `edge` bytes and has only `inner` ones between.
fn framed(text: &str, edge: impl Fn(u8) -> bool, inner: impl Fn(u8) -> bool) -> bool {
    let bytes = text.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return false };
    edge(*first) && edge(*last) && bytes.iter().all(|byte| inner(*byte))
}

fn lower_alnum(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit()
}

fn lower_alnum_dash(byte: u8) -> bool {
    lower_alnum(byte) || byte == b'-'
}

fn name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.')
}

fn is_label(text: &str) -> bool {
    framed(text, lower_alnum, lower_alnum_dash)
}

fn is_subdomain(text: &str) -> bool {
    text.split('.').all(is_label)
}

fn check(value: &str, max: usize, good: bool, message: impl FnOnce() -> String) -> Problems {
    let mut problems = Vec::new();
    if value.len() > max {
        problems.push(max_len_error(max));
    }
    if !good {
        problems.push(message());
    }
    problems
}

/// A DNS label as of RFC 1123: most namespaced names that become host names.
pub fn dns1123_label(value: &str) -> Problems {
    check(value, LABEL_MAX_BYTES, is_label(value), || {
        regex_error(
            "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character",
            LABEL_FMT,
            &["my-name", "123-abc"],
        )
    })
}

/// A DNS subdomain as of RFC 1123: the usual rule for names of objects.
pub fn dns1123_subdomain(value: &str) -> Problems {
    check(value, SUBDOMAIN_MAX_BYTES, is_subdomain(value), || {
        regex_error(
            "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character",
            SUBDOMAIN_FMT,
            &["example.com"],
        )
    })
}

/// The same with underscores, one of which may begin a label (RFC 2782): search paths of pods.
pub fn dns1123_subdomain_with_underscore(value: &str) -> Problems {
    let is_label = |label: &str| {
        let label = label.strip_prefix('_').unwrap_or(label);
        framed(label, lower_alnum, |byte| lower_alnum_dash(byte) || byte == b'_')
    };
    check(value, SUBDOMAIN_MAX_BYTES, value.split('.').all(is_label), || {
        let label = "_?[a-z0-9]([-_a-z0-9]*[a-z0-9])?";
        regex_error(
            "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '_', '-' or '.', and must start and end with an alphanumeric character",
            &format!(r"{label}(\.{label})*"),
            &["example.com"],
        )
    })
}

/// A DNS label as of RFC 1035: names of Services.
pub fn dns1035_label(value: &str) -> Problems {
    let good = is_label(value) && value.as_bytes().first().is_some_and(u8::is_ascii_lowercase);
    check(value, LABEL_MAX_BYTES, good, || {
        regex_error(
            "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end with an alphanumeric character",
            "[a-z]([-a-z0-9]*[a-z0-9])?",
            &["my-name", "abc-123"],
        )
    })
}

/// A subdomain behind `*.`.
pub fn wildcard_dns1123_subdomain(value: &str) -> Problems {
    let good = value.strip_prefix("*.").is_some_and(is_subdomain);
    check(value, SUBDOMAIN_MAX_BYTES, good, || {
        regex_error(
            "a wildcard DNS-1123 subdomain must start with '*.', followed by a valid DNS subdomain, which must consist of lower case alphanumeric characters, '-' or '.' and end with an alphanumeric character",
            &format!(r"\*\.{SUBDOMAIN_FMT}"),
            &["*.example.com"],
        )
    })
}

/// A name with an optional subdomain before a slash: keys of labels and annotations, finalizers, taints.
pub fn qualified_name(value: &str) -> Problems {
    let shape = || {
        regex_error(
            "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character",
            "([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]",
            &["MyName", "my.name", "123-abc"],
        )
    };
    let mut problems = Vec::new();
    let mut parts = value.split('/');
    let name = match (parts.next(), parts.next(), parts.next()) {
        (Some(prefix), Some(name), None) => {
            if prefix.is_empty() {
                problems.push("prefix part must be non-empty".to_owned());
            } else {
                problems
                    .extend(dns1123_subdomain(prefix).iter().map(|problem| format!("prefix part {problem}")));
            }
            name
        }
        (Some(name), None, _) => name,
        _ => {
            return vec![format!(
                "a qualified name {} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')",
                shape()
            )];
        }
    };
    if name.is_empty() {
        problems.push("name part must be non-empty".to_owned());
    } else if name.len() > LABEL_MAX_BYTES {
        problems.push(format!("name part {}", max_len_error(LABEL_MAX_BYTES)));
    }
    if !framed(name, |byte| byte.is_ascii_alphanumeric(), name_byte) {
        problems.push(format!("name part {}", shape()));
    }
    problems
}

/// The value of a label.
pub fn label_value(value: &str) -> Problems {
    let good = value.is_empty() || framed(value, |byte| byte.is_ascii_alphanumeric(), name_byte);
    check(value, LABEL_MAX_BYTES, good, || {
        regex_error(
            "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character",
            "(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?",
            &["MyValue", "my_value", "12345"],
        )
    })
}

/// The name of an environment variable: printable ASCII without `=`.
pub fn env_var_name(value: &str) -> Problems {
    if value.is_empty() {
        return vec!["environment variable name must be non-empty".to_owned()];
    }
    if value.bytes().all(|byte| (b' '..=b'~').contains(&byte) && byte != b'=') {
        return Vec::new();
    }
    vec![
        "a valid environment variable name must consist only of printable ASCII characters other than '='"
            .to_owned(),
    ]
}

/// A key in a ConfigMap or Secret.
pub fn config_map_key(value: &str) -> Problems {
    let good = !value.is_empty() && value.bytes().all(name_byte);
    let mut problems = check(value, SUBDOMAIN_MAX_BYTES, good, || {
        regex_error(
            "a valid config key must consist of alphanumeric characters, '-', '_' or '.'",
            "[-._a-zA-Z0-9]+",
            &["key.name", "KEY_NAME", "key-name"],
        )
    });
    match value {
        "." => problems.push("must not be '.'".to_owned()),
        ".." => problems.push("must not be '..'".to_owned()),
        _ if value.starts_with("..") => problems.push("must not start with '..'".to_owned()),
        _ => {}
    }
    problems
}

/// A name that may be one segment of a path: RBAC roles and bindings.
pub fn path_segment(value: &str) -> Problems {
    if value == "." || value == ".." {
        return vec![format!("may not be '{value}'")];
    }
    ["/", "%"]
        .iter()
        .filter(|part| value.contains(**part))
        .map(|part| format!("may not contain '{part}'"))
        .collect()
}

/// A port number.
pub fn port_number(value: i64) -> Problems {
    if (1..=65535).contains(&value) { Vec::new() } else { vec![range_error(1, 65535)] }
}

/// The name of a port (RFC 6335).
pub fn port_name(value: &str) -> Problems {
    let mut problems = Vec::new();
    if value.len() > PORT_NAME_MAX_BYTES {
        problems.push(max_len_error(PORT_NAME_MAX_BYTES));
    }
    let mut unless = |good: bool, message: &str| {
        if !good {
            problems.push(message.to_owned());
        }
    };
    unless(
        !value.is_empty() && value.bytes().all(lower_alnum_dash),
        "must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)",
    );
    unless(value.bytes().any(|byte| byte.is_ascii_lowercase()), "must contain at least one letter (a-z)");
    unless(!value.contains("--"), "must not contain consecutive hyphens");
    unless(!value.starts_with('-') && !value.ends_with('-'), "must not begin or end with a hyphen");
    problems
}

/// An IP address.
pub fn ip(value: &str) -> Problems {
    match value.parse::<IpAddr>() {
        Ok(_) => Vec::new(),
        Err(_) => vec!["must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)".to_owned()],
    }
}

/// A network in CIDR notation.
pub fn cidr(value: &str) -> Problems {
    if value.contains('/') && value.parse::<ipnetwork::IpNetwork>().is_ok() {
        return Vec::new();
    }
    vec!["must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)".to_owned()]
}

/// A network in CIDR notation as new fields demand it: in canonical form, without bits of a host.
pub fn strict_cidr(value: &str) -> Problems {
    let bad = cidr(value);
    let Some((network, false)) = value.parse::<ipnetwork::IpNetwork>().ok().map(|n| (n, !bad.is_empty()))
    else {
        return bad;
    };
    let mapped = matches!(network, ipnetwork::IpNetwork::V6(v6) if v6.ip().to_ipv4_mapped().is_some());
    let canonical = network.to_string();
    if mapped {
        return vec!["must not have an IPv4-mapped IPv6 address".to_owned()];
    }
    let mut problems = Vec::new();
    if value != canonical {
        problems.push(format!("must be in canonical form ({canonical:?})"));
    }
    if network.ip() != network.network() {
        problems.push("must not have bits set beyond the prefix length".to_owned());
    }
    problems
}

/// The name of an IPAddress: an address as it is always written.
pub fn canonical_ip(value: &str) -> Problems {
    match value.parse::<IpAddr>() {
        Ok(address) if address.to_string() == value => Vec::new(),
        Ok(_) => vec!["must be a canonical format IP address".to_owned()],
        Err(_) => ip(value),
    }
}

/// A percentage such as `25%`.
pub fn percent(value: &str) -> Problems {
    let digits = value.strip_suffix('%').unwrap_or_default();
    if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Vec::new();
    }
    vec![regex_error(
        "a valid percent string must be a numeric string followed by an ending '%'",
        "[0-9]+%",
        &["1%", "93%"],
    )]
}

/// The name of an HTTP header.
pub fn http_header_name(value: &str) -> Problems {
    if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
        return Vec::new();
    }
    vec![regex_error(
        "a valid HTTP header must consist of alphanumeric characters or '-'",
        "[-A-Za-z0-9]+",
        &["X-Header-Name"],
    )]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_and_subdomains() {
        for good in ["a", "my-name", "123-abc", &"a".repeat(63)] {
            assert_eq!(dns1123_label(good), Problems::new(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a_b", &"a".repeat(64)] {
            assert_eq!(dns1123_label(bad).len(), 1, "{bad}");
        }
        assert!(dns1123_subdomain("a.b-c.d").is_empty());
        for bad in ["", ".", "a..b", "a.-b", "a.b."] {
            assert_eq!(dns1123_subdomain(bad).len(), 1, "{bad}");
        }
        for good in ["a.b-c.d", "_sip._tcp.abc_d.example.com"] {
            assert!(dns1123_subdomain_with_underscore(good).is_empty(), "{good}");
        }
        for bad in ["", "_", "__a", "a_", "a._.b", "a..b", "A"] {
            assert_eq!(dns1123_subdomain_with_underscore(bad).len(), 1, "{bad}");
        }
        assert!(dns1035_label("a1").is_empty() && !dns1035_label("1a").is_empty());
        assert!(
            wildcard_dns1123_subdomain("*.a.b").is_empty() && !wildcard_dns1123_subdomain("a.b").is_empty()
        );
        assert_eq!(
            dns1123_label("A")[0],
            "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
        );
    }

    #[test]
    fn qualified_names_and_values() {
        for good in ["a", "A.b_c-d", "example.com/x", "kubernetes.io/metadata.name"] {
            assert!(qualified_name(good).is_empty(), "{good}");
        }
        assert_eq!(qualified_name("/x"), ["prefix part must be non-empty"]);
        assert_eq!(qualified_name("").len(), 2);
        assert!(qualified_name("a/b/c")[0].starts_with("a qualified name must consist"));
        assert!(qualified_name("Bad.Prefix/x")[0].starts_with("prefix part a lowercase RFC 1123 subdomain"));
        assert!(label_value("").is_empty() && label_value("a_B").is_empty());
        assert_eq!(label_value("a b").len(), 1);
        assert_eq!(label_value(&"a".repeat(64)), [max_len_error(63)]);
    }

    #[test]
    fn ports_keys_and_addresses() {
        assert!(port_name("http-2").is_empty());
        assert_eq!(port_name("80"), ["must contain at least one letter (a-z)"]);
        assert_eq!(port_name("-a--b").len(), 2);
        assert_eq!(port_number(0), ["must be between 1 and 65535, inclusive"]);
        assert!(config_map_key("a.b").is_empty());
        assert_eq!(config_map_key(".."), ["must not be '..'"]);
        assert_eq!(config_map_key("..a"), ["must not start with '..'"]);
        assert!(env_var_name("A b.c-1").is_empty() && !env_var_name("a=b").is_empty());
        assert!(ip("::1").is_empty() && !ip("1.2.3").is_empty());
        assert!(cidr("10.0.0.0/8").is_empty() && !cidr("10.0.0.0").is_empty());
        assert!(percent("25%").is_empty() && !percent("%").is_empty());
        assert_eq!(path_segment("a/b%"), ["may not contain '/'", "may not contain '%'"]);
    }
}
