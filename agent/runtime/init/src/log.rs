//! A container's log file: CRI's line format, and rotation by size.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use crate::clock;

/// A longer line is cut into parts, as CRI runtimes do.
pub(crate) const MAX_LINE_BYTES: usize = 16 << 10;
/// Upstream kubelet's defaults of `containerLogMaxSize` and `containerLogMaxFiles`.
pub(crate) const MAX_FILE_BYTES: u64 = 10 << 20;
pub(crate) const MAX_FILES: usize = 5;

/// Where a line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

/// The log of one container.
pub(crate) struct Log {
    path: PathBuf,
    file: File,
    written_bytes: u64,
    max_file_bytes: u64,
}

/// What was read from one stream and isn't a whole line yet.
#[derive(Default)]
pub(crate) struct Pending(Vec<u8>);

impl Log {
    pub(crate) fn open(path: &Path, max_file_bytes: u64) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let written_bytes = file.metadata()?.len();
        Ok(Self { path: path.to_path_buf(), file, written_bytes, max_file_bytes })
    }

    /// Takes what a stream gave. Whole lines are written; the rest waits in `pending`.
    pub(crate) fn take(&mut self, stream: Stream, pending: &mut Pending, bytes: &[u8]) -> io::Result<()> {
        let mut out = Vec::with_capacity(bytes.len() + 64);
        let mut rest = bytes;
        while !rest.is_empty() {
            let room = MAX_LINE_BYTES - pending.0.len();
            let window = &rest[..rest.len().min(room)];
            if let Some(end) = window.iter().position(|byte| *byte == b'\n') {
                pending.0.extend_from_slice(&rest[..end]);
                line(&mut out, stream, 'F', &pending.0);
                rest = &rest[end + 1..];
            } else {
                pending.0.extend_from_slice(window);
                rest = &rest[window.len()..];
                if pending.0.len() < MAX_LINE_BYTES {
                    break;
                }
                line(&mut out, stream, 'P', &pending.0);
            }
            pending.0.clear();
        }
        self.append(&out)
    }

    /// The stream has ended: what has no newline is a partial line.
    pub(crate) fn end(&mut self, stream: Stream, pending: &mut Pending) -> io::Result<()> {
        if pending.0.is_empty() {
            return Ok(());
        }
        let mut out = Vec::new();
        line(&mut out, stream, 'P', &pending.0);
        pending.0.clear();
        self.append(&out)
    }

    fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        if lines.is_empty() {
            return Ok(());
        }
        let size = u64::try_from(lines.len()).unwrap_or(u64::MAX);
        if self.written_bytes > 0 && self.written_bytes.saturating_add(size) > self.max_file_bytes {
            self.rotate()?;
        }
        self.file.write_all(lines)?;
        self.written_bytes = self.written_bytes.saturating_add(size);
        Ok(())
    }

    /// `0.log` becomes `0.log.<time>`, as upstream's kubelet names it; the oldest files beyond the limit go.
    fn rotate(&mut self) -> io::Result<()> {
        let mut stamp = String::new();
        // Writing to a string can't fail.
        let _ = clock::rfc3339(&mut stamp, clock::now_ns());
        let stamp: String = stamp.chars().filter(|c| c.is_ascii_digit() || matches!(c, 'T' | '.')).collect();
        let mut rotated = self.path.clone().into_os_string();
        rotated.push(format!(".{}", stamp.replace('T', "-")));
        fs::rename(&self.path, &rotated)?;
        self.file = OpenOptions::new().create(true).append(true).open(&self.path)?;
        self.written_bytes = 0;
        self.prune()
    }

    fn prune(&self) -> io::Result<()> {
        let (Some(folder), Some(name)) = (self.path.parent(), self.path.file_name()) else { return Ok(()) };
        let prefix = format!("{}.", name.to_string_lossy());
        let mut old: Vec<PathBuf> = fs::read_dir(folder)?
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
            .map(|entry| entry.path())
            .collect();
        old.sort();
        let surplus = (old.len() + 1).saturating_sub(MAX_FILES);
        old.iter().take(surplus).try_for_each(fs::remove_file)
    }
}

fn line(out: &mut Vec<u8>, stream: Stream, tag: char, content: &[u8]) {
    let mut head = String::with_capacity(48);
    // Writing to a string can't fail.
    let _ = clock::rfc3339(&mut head, clock::now_ns());
    head.push_str(match stream {
        Stream::Stdout => " stdout ",
        Stream::Stderr => " stderr ",
    });
    head.push(tag);
    head.push(' ');
    out.extend_from_slice(head.as_bytes());
    out.extend_from_slice(content);
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("weft-log-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn without_times(path: &Path) -> Vec<String> {
        let text = fs::read_to_string(path).unwrap();
        text.lines().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect()
    }

    #[test]
    fn lines_are_kept_together_across_reads() {
        let folder = Folder::new("lines");
        let path = folder.0.join("c/0.log");
        let mut log = Log::open(&path, MAX_FILE_BYTES).unwrap();
        let (mut out, mut err) = (Pending::default(), Pending::default());
        log.take(Stream::Stdout, &mut out, b"hel").unwrap();
        log.take(Stream::Stderr, &mut err, b"oops\n").unwrap();
        log.take(Stream::Stdout, &mut out, b"lo\n\nend").unwrap();
        log.end(Stream::Stdout, &mut out).unwrap();
        log.end(Stream::Stderr, &mut err).unwrap();
        assert_eq!(without_times(&path), ["stderr F oops", "stdout F hello", "stdout F ", "stdout P end"]);
    }

    #[test]
    fn a_long_line_is_cut_at_16_kib_wherever_the_reads_end() {
        let folder = Folder::new("long");
        let path = folder.0.join("0.log");
        let mut log = Log::open(&path, MAX_FILE_BYTES).unwrap();
        let mut pending = Pending::default();
        let text = [vec![b'a'; MAX_LINE_BYTES + 5], vec![b'\n']].concat();
        for part in text.chunks(1000) {
            log.take(Stream::Stdout, &mut pending, part).unwrap();
        }
        let lines = without_times(&path);
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0].len(), "stdout P ".len() + MAX_LINE_BYTES);
        assert_eq!(lines[1], "stdout F aaaaa");
    }

    #[test]
    fn files_rotate_by_size_and_the_oldest_go() {
        let folder = Folder::new("rotate");
        let path = folder.0.join("0.log");
        let mut log = Log::open(&path, 200).unwrap();
        let mut pending = Pending::default();
        for number in 0..40 {
            log.take(Stream::Stdout, &mut pending, format!("line {number} {}\n", "x".repeat(60)).as_bytes())
                .unwrap();
        }
        let mut files: Vec<PathBuf> = fs::read_dir(&folder.0).unwrap().map(|e| e.unwrap().path()).collect();
        files.sort();
        assert_eq!(files.len(), MAX_FILES);
        assert_eq!(files[0], path);
        assert!(files.iter().all(|file| fs::metadata(file).unwrap().len() <= 200));
        assert!(fs::read_to_string(&path).unwrap().contains("line 39"));
    }
}
