//! Owns the links of a page that comes through `proxy`: those to the top of its own server lead back through the proxy.
//!
//! A page is HTML in any encoding whose ASCII is ASCII. Nothing but the links changes, so a page that isn't well formed stays as it is.

use std::io::{self, Write};
use std::ops::Range;

/// A tag longer than this passes as it is.
const LONGEST_TAG_BYTES: usize = 64 * 1024;
/// Of comments and raw text, more than this is written on at once.
const LONGEST_HELD_BYTES: usize = 4096;
/// `</textarea` and `</noframes` are the longest ends.
const LONGEST_END_BYTES: usize = 10;
/// Attributes that hold one URL, by element: those that upstream changes (HTML Living Standard §4, and HTML 4's of old).
const URLS: [(&[u8], &[&[u8]]); 25] = [
    (b"a", &[b"href"]),
    (b"applet", &[b"codebase"]),
    (b"area", &[b"href"]),
    (b"audio", &[b"src"]),
    (b"base", &[b"href"]),
    (b"blockquote", &[b"cite"]),
    (b"body", &[b"background"]),
    (b"button", &[b"formaction"]),
    (b"command", &[b"icon"]),
    (b"del", &[b"cite"]),
    (b"embed", &[b"src"]),
    (b"form", &[b"action"]),
    (b"frame", &[b"longdesc", b"src"]),
    (b"head", &[b"profile"]),
    (b"html", &[b"manifest"]),
    (b"iframe", &[b"longdesc", b"src"]),
    (b"img", &[b"longdesc", b"src", b"usemap"]),
    (b"input", &[b"src", b"usemap", b"formaction"]),
    (b"ins", &[b"cite"]),
    (b"link", &[b"href"]),
    (b"object", &[b"classid", b"codebase", b"data", b"usemap"]),
    (b"q", &[b"cite"]),
    (b"script", &[b"src"]),
    (b"source", &[b"src"]),
    (b"video", &[b"poster", b"src"]),
];
/// Elements whose content is text, up to their own end tag.
const RAW: [&[u8]; 8] =
    [b"script", b"style", b"textarea", b"title", b"xmp", b"iframe", b"noembed", b"noframes"];

/// Where in a page the next byte is.
#[derive(Debug)]
enum Place {
    Text,
    /// From `<` to the end that is not yet seen.
    Tag {
        quote: Option<u8>,
    },
    /// Up to `-->`.
    Comment,
    /// Up to `</` and this name.
    Raw(&'static [u8]),
    /// Of a tag that is too long; up to its end.
    Skipped {
        quote: Option<u8>,
    },
}

/// The way to a server through the proxy.
#[derive(Debug)]
pub(super) struct Way {
    /// The path of the proxy, without a slash at its end.
    pub(super) prefix: String,
    /// The host that the client asked for: a link that names it keeps it.
    pub(super) asked: Option<String>,
    /// The address that the request went to, which the client may not reach: a link that names it loses it.
    pub(super) backend: Option<String>,
}

impl Way {
    /// What of the head of a URL goes, where, and what comes in its place; `None` if it leads elsewhere or already through the proxy.
    pub(super) fn lead(&self, url: &[u8]) -> Option<(Range<usize>, &str)> {
        let path = self.path(url)?;
        let leads = url[path.end..].starts_with(b"/") && !url[path.end..].starts_with(self.prefix.as_bytes());
        leads.then_some((path, self.prefix.as_str()))
    }

    /// What goes of a URL to this server: nothing, or the scheme and host. The path begins behind it.
    fn path(&self, url: &[u8]) -> Option<Range<usize>> {
        let scheme = [&b"http://"[..], b"https://", b"//"].into_iter().find(|scheme| url.starts_with(scheme));
        let Some(scheme) = scheme else { return Some(0..0) };
        let rest = &url[scheme.len()..];
        let host = &rest[..rest.iter().position(|byte| *byte == b'/').unwrap_or(rest.len())];
        let is = |name: &Option<String>| name.as_ref().is_some_and(|name| name.as_bytes() == host);
        let end = scheme.len() + host.len();
        if is(&self.asked) {
            return Some(end..end);
        }
        is(&self.backend).then_some(0..end)
    }
}

/// Writes a page on, with its links led on a way.
#[derive(Debug)]
pub(super) struct Links<W> {
    to: W,
    way: Way,
    place: Place,
    held: Vec<u8>,
}

impl<W: Write> Links<W> {
    pub(super) fn new(to: W, way: Way) -> Self {
        Self { to, way, place: Place::Text, held: Vec::new() }
    }

    pub(super) fn get_mut(&mut self) -> &mut W {
        &mut self.to
    }

    /// Writes what a page that broke off left.
    pub(super) fn end(mut self) -> io::Result<W> {
        self.pass()?;
        Ok(self.to)
    }

    fn pass(&mut self) -> io::Result<()> {
        let passed = self.to.write_all(&self.held);
        self.held.clear();
        passed
    }

    /// Keeps what the end of a comment or of raw text may begin with.
    fn pass_most(&mut self) -> io::Result<()> {
        if self.held.len() > LONGEST_HELD_BYTES {
            let last = self.held.split_off(self.held.len() - LONGEST_END_BYTES);
            self.pass()?;
            self.held = last;
        }
        Ok(())
    }

    /// Takes the next byte. What is held is text, or one tag up to here.
    fn take(&mut self, byte: u8) -> io::Result<()> {
        match &mut self.place {
            Place::Text => {
                if byte == b'<' {
                    self.pass()?;
                    self.place = Place::Tag { quote: None };
                }
                self.held.push(byte);
            }
            Place::Tag { quote } => {
                self.held.push(byte);
                if self.held == b"<!--" {
                    self.place = Place::Comment;
                } else if self.held.len() == 2 && !begins_tag(byte) {
                    self.place = Place::Text;
                } else if ends_tag(quote, byte, &self.held) {
                    return self.tag();
                } else if self.held.len() > LONGEST_TAG_BYTES {
                    self.place = Place::Skipped { quote: *quote };
                }
            }
            Place::Comment => {
                self.held.push(byte);
                if self.held.ends_with(b"-->") {
                    self.place = Place::Text;
                }
                return self.pass_most();
            }
            Place::Raw(name) => {
                self.held.push(byte);
                if ends_raw(&self.held, name) {
                    self.place = Place::Skipped { quote: None };
                }
                return self.pass_most();
            }
            Place::Skipped { quote } => {
                self.held.push(byte);
                if ends_tag(quote, byte, &self.held) {
                    self.place = Place::Text;
                }
            }
        }
        Ok(())
    }

    /// Writes the tag that is held.
    fn tag(&mut self) -> io::Result<()> {
        let tag = std::mem::take(&mut self.held);
        self.place = Place::Text;
        let name = name(&tag);
        if let Some(raw) = RAW.iter().find(|raw| name.eq_ignore_ascii_case(raw)) {
            self.place = Place::Raw(raw);
        }
        let of_element = URLS.iter().find(|(element, _)| name.eq_ignore_ascii_case(element));
        let mut written = 0;
        for url in of_element.map(|(_, attributes)| urls(&tag, attributes)).unwrap_or_default() {
            let Some((cut, insert)) = self.way.lead(&tag[url..]) else { continue };
            self.to.write_all(&tag[written..url + cut.start])?;
            self.to.write_all(insert.as_bytes())?;
            written = url + cut.end;
        }
        self.to.write_all(&tag[written..])
    }
}

impl<W: Write> Write for Links<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            self.take(*byte)?;
        }
        Ok(bytes.len())
    }

    /// Text is written on; a tag is not until its end is seen.
    fn flush(&mut self) -> io::Result<()> {
        match self.place {
            Place::Text => self.pass()?,
            // Their ends are found by the last bytes held.
            Place::Tag { .. } | Place::Comment | Place::Raw(_) => {}
            Place::Skipped { .. } => self.pass()?,
        }
        self.to.flush()
    }
}

fn begins_tag(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || matches!(byte, b'!' | b'/' | b'?')
}

/// Whether a byte ends the tag. A quote counts behind a `=` only.
fn ends_tag(quote: &mut Option<u8>, byte: u8, tag: &[u8]) -> bool {
    match *quote {
        Some(open) if byte == open => *quote = None,
        Some(_) => {}
        None if matches!(byte, b'"' | b'\'') => {
            let before = tag[..tag.len() - 1].trim_ascii_end();
            if before.ends_with(b"=") {
                *quote = Some(byte);
            }
        }
        None => return byte == b'>',
    }
    false
}

/// Whether the text ends with the start of the end tag of that name.
fn ends_raw(text: &[u8], name: &[u8]) -> bool {
    let Some(at) = text.len().checked_sub(name.len() + 2) else { return false };
    text[at..].starts_with(b"</") && text[at + 2..].eq_ignore_ascii_case(name)
}

/// The name of a tag's element; empty, or with a slash before it, for what opens none.
fn name(tag: &[u8]) -> &[u8] {
    let ends = |byte: &u8| byte.is_ascii_whitespace() || matches!(byte, b'/' | b'>');
    let length = tag[1..].iter().position(ends).unwrap_or(tag.len() - 1);
    &tag[1..=length]
}

/// Where in a tag the values of these attributes begin.
fn urls(tag: &[u8], attributes: &[&[u8]]) -> Vec<usize> {
    let mut found = Vec::new();
    let skip = |mut at: usize, which: fn(u8) -> bool| {
        while tag.get(at).is_some_and(|byte| which(*byte)) {
            at += 1;
        }
        at
    };
    let is_name = |byte: u8| !byte.is_ascii_whitespace() && !matches!(byte, b'=' | b'/' | b'>');
    let mut at = skip(1, is_name);
    while at < tag.len() {
        let name = skip(at, |byte| byte.is_ascii_whitespace() || byte == b'/');
        let name_end = skip(name, is_name);
        let equals = skip(name_end, |byte| byte.is_ascii_whitespace());
        if tag.get(equals) != Some(&b'=') {
            at = name_end.max(at + 1);
            continue;
        }
        let mut value = skip(equals + 1, |byte| byte.is_ascii_whitespace());
        let end = match tag.get(value) {
            Some(quote @ (b'"' | b'\'')) => {
                value += 1;
                tag[value..]
                    .iter()
                    .position(|byte| byte == quote)
                    .map_or(tag.len(), |length| value + length + 1)
            }
            _ => skip(value, |byte| !byte.is_ascii_whitespace() && byte != b'>'),
        };
        if attributes.iter().any(|attribute| tag[name..name_end].eq_ignore_ascii_case(attribute)) {
            found.push(value);
        }
        at = end.max(at + 1);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const PREFIX: &str = "/api/v1/namespaces/a/pods/http:b:80/proxy";

    fn through(page: &str, chunk: usize) -> String {
        let way = Way {
            prefix: PREFIX.to_owned(),
            asked: Some("localhost:8001".to_owned()),
            backend: Some("10.42.0.7:80".to_owned()),
        };
        let mut links = Links::new(Vec::new(), way);
        for part in page.as_bytes().chunks(chunk) {
            links.write_all(part).expect("a Vec takes all");
            links.flush().expect("a Vec takes all");
        }
        String::from_utf8(links.end().expect("a Vec takes all")).expect("what went in was UTF-8")
    }

    #[test]
    fn links_to_the_top_lead_through_the_proxy() {
        let rows = [
            ("<a href=\"/x\">t</a>", "<a href=\"^/x\">t</a>"),
            ("<A HREF='/x?a=/b' id=/x>", "<A HREF='^/x?a=/b' id=/x>"),
            ("<img alt=\"a>b\" src=/i.png><p>1 < 2", "<img alt=\"a>b\" src=^/i.png><p>1 < 2"),
            (
                "<form\naction = \"/go\"><button formaction=/x/>",
                "<form\naction = \"^/go\"><button formaction=^/x/>",
            ),
            ("<div data=/x href=/x><p/><object data=/x>", "<div data=/x href=/x><p/><object data=^/x>"),
            ("<a href=http://localhost:8001/x>", "<a href=http://localhost:8001^/x>"),
            ("<a href=http://10.42.0.7:8080/x></a href=/x>", ""),
            ("<a href=x><a href=\"//h/x\"><a href=\"http://h/x\">", ""),
            ("<a href=\"http://10.42.0.7:80/x\">", "<a href=\"^/x\">"),
            ("<!-- <a href=\"/x\"> --><a href=/y>", "<!-- <a href=\"/x\"> --><a href=^/y>"),
            (
                "<script src=/s>a='<a href=\"/x\">'</script><b>",
                "<script src=^/s>a='<a href=\"/x\">'</script><b>",
            ),
            ("<title><a href=/x></title ><a href=/y>", "<title><a href=/x></title ><a href=^/y>"),
            ("<a title=it's href=\"/x\">", "<a title=it's href=\"^/x\">"),
            ("<a href=\"/api/v1/namespaces/a/pods/http:b:80/proxy/x\">", ""),
            ("<a href=\"/broken", ""),
            ("<!doctype html><a", ""),
            ("< a href=/x> <3 </", ""),
        ];
        for (page, expected) in rows {
            let expected = if expected.is_empty() { page.to_owned() } else { expected.replace('^', PREFIX) };
            for chunk in [1, 2, 3, 7, 1000] {
                assert_eq!(through(page, chunk), expected, "in chunks of {chunk}");
            }
        }
    }

    #[test]
    fn a_tag_without_end_is_not_held() {
        let page = format!("<a href=\"/x\" {} ><a href=/y>", "b ".repeat(LONGEST_TAG_BYTES));
        let passed = through(&page, 1000);
        assert!(passed.starts_with("<a href=\"/x\"") && passed.ends_with(&format!("<a href={PREFIX}/y>")));
        let page = format!("<script>{}</script><a href=/y>", "b </".repeat(LONGEST_TAG_BYTES));
        assert_eq!(through(&page, 1000), page.replace("/y", &format!("{PREFIX}/y")));
    }
}
