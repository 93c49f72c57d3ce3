//! Images: archives, layers, references. Archives are written down as text, so that their checksums and digests are right.

use std::fmt::Write as _;
use std::path::Path;

use sha2::{Digest as _, Sha256};
use tar::{EntryType, Header};
use weft_agent_runtime::images::{Reference, fuzz};

/// One entry of a tar, whatever its name.
fn append(tar: &mut Vec<u8>, kind: EntryType, name: &[u8], link: &[u8], content: &[u8]) {
    let mut header = Header::new_gnu();
    let fields = header.as_old_mut();
    let put = |to: &mut [u8], from: &[u8]| {
        let count = from.len().min(to.len());
        to[..count].copy_from_slice(&from[..count]);
    };
    put(&mut fields.name, name);
    put(&mut fields.linkname, link);
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    header.set_size(u64::try_from(content.len()).unwrap_or(0));
    header.set_cksum();
    tar.extend(header.as_bytes());
    tar.extend(content);
    tar.resize(tar.len().next_multiple_of(512), 0);
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// `@name` begins a file; `$0` to `$9` stand for the digest of one before it; `@a>b` is a link. Anything else is read as it is.
fn written(bytes: &[u8]) -> Vec<u8> {
    let Ok(text) = std::str::from_utf8(bytes) else { return bytes.to_vec() };
    let Some(files) = text.strip_prefix('@') else { return bytes.to_vec() };
    let (mut tar, mut digests) = (Vec::new(), Vec::<String>::new());
    for file in files.split("\n@") {
        let mut filled = file.to_owned();
        for (number, digest) in digests.iter().enumerate().take(10) {
            filled = filled.replace(&format!("${number}"), digest);
        }
        let (name, content) = filled.split_once('\n').unwrap_or((&filled, ""));
        let own = digest(content.as_bytes());
        let name = name.replace("$=", &own);
        match name.split_once('>') {
            Some((name, to)) => append(&mut tar, EntryType::Symlink, name.as_bytes(), to.as_bytes(), &[]),
            None => append(&mut tar, EntryType::Regular, name.as_bytes(), &[], content.as_bytes()),
        }
        digests.push(own);
    }
    tar.extend([0; 1024]);
    tar
}

/// An archive to import.
pub(crate) fn archive(bytes: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder for temporary files");
    let path = folder.path().join("archive.tar");
    std::fs::write(&path, written(bytes)).expect("a file in it");
    fuzz::archive(&path, folder.path());
    assert_eq!(names(folder.path()), ["archive.tar"], "nothing is left");
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// A layer, an entry a line: `f name text`, `d name`, `s name target`, `h name target`, `c name`. Nothing outside of its folder is
/// touched, whatever names and links say.
pub(crate) fn layer(bytes: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder for temporary files");
    let (root, secret) = (folder.path().join("root"), folder.path().join("secret"));
    std::fs::create_dir(&root).and_then(|()| std::fs::write(&secret, "kept")).expect("files in it");
    let mut tar = Vec::new();
    for line in bytes.split(|byte| *byte == b'\n').take(64) {
        let mut words = line.splitn(3, |byte| *byte == b' ');
        let (kind, name) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let rest = words.next().unwrap_or_default();
        match kind {
            b"f" => append(&mut tar, EntryType::Regular, name, &[], rest),
            b"d" => append(&mut tar, EntryType::Directory, name, &[], &[]),
            b"s" => append(&mut tar, EntryType::Symlink, name, rest, &[]),
            b"h" => append(&mut tar, EntryType::Link, name, rest, &[]),
            b"c" => append(&mut tar, EntryType::Char, name, &[], &[]),
            _ => tar.extend(line),
        }
    }
    tar.extend([0; 1024]);
    fuzz::layer(&tar, &root);
    assert_eq!(names(folder.path()), ["root", "secret"]);
    assert_eq!(std::fs::read(&secret).ok().as_deref(), Some(b"kept".as_slice()));
}

/// The name of an image.
pub(crate) fn reference(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Some(reference) = Reference::parse(text) else { return };
    assert_eq!(Reference::parse(&reference.to_string()), Some(reference));
}
