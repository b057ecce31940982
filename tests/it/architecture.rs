//! The structure of the code and its references: which module may use which, where writes happen, and that every
//! reference to a document or a test resolves.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The modules of the crate, and the modules that each may use besides itself (docs/architecture.md).
const ARROWS: &[(&str, &[&str])] = &[
    ("api", &[]),
    ("ops", &[]),
    ("domain", &["api"]),
    ("zitadel", &["domain"]),
    ("controller", &["zitadel", "domain", "api", "ops"]),
    ("cli", &["controller", "zitadel", "domain", "api", "ops"]),
];

/// Documents that are not in the repository.
const FOREIGN_DOCUMENTS: [&str; 9] = [
    "design §",
    "decision K",
    "zitadel.md §",
    "kube.md §",
    "testbed.md §",
    "operators.md",
    "reference/zitadel.md",
    "reference/kube.md",
    "reference/testbed.md",
];

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    entries.map(|e| e.expect("readable").path()).collect()
}

/// All files in a folder and its subfolders.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in entries(folder) {
        if entry.is_dir() {
            all.extend(files(&entry));
        } else {
            all.push(entry);
        }
    }
    all
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|e| e == extension)
}

/// All Rust files in a folder and its subfolders, with their text.
fn sources(folder: &Path) -> Vec<(PathBuf, String)> {
    let rust = files(folder).into_iter().filter(|path| has_extension(path, "rs"));
    rust.map(|path| {
        let text = std::fs::read_to_string(&path).expect("readable");
        (path, text)
    })
    .collect()
}

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

#[test]
fn modules_use_only_allowed_modules() {
    for (module, may_use) in ARROWS {
        let folder = source().join(module);
        let files = sources(&folder);
        assert!(!files.is_empty(), "{module} is empty");
        for (path, text) in files {
            for used in text.split("crate::").skip(1) {
                let other: String = used
                    .chars()
                    .take_while(|c| c.is_ascii_lowercase() || *c == '_')
                    .collect();
                let known = ARROWS.iter().any(|(m, _)| *m == other);
                let allowed = other == *module || may_use.contains(&other.as_str());
                assert!(known && allowed, "{} uses crate::{other}", path.display());
            }
            assert!(!text.contains("super::super"), "{} uses super::super", path.display());
        }
    }
    let modules: BTreeSet<String> = std::fs::read_dir(source())
        .expect("a folder")
        .map(|e| e.expect("readable"))
        .filter(|e| e.path().is_dir() && e.file_name() != "tests")
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    assert_eq!(modules, ARROWS.iter().map(|(m, _)| (*m).to_owned()).collect());
}

#[test]
fn the_domain_is_pure() {
    for (path, text) in sources(&source().join("domain")) {
        for word in [
            "kube::", "reqwest", "tokio", "::now()", "spawn", "async ", "std::env", "std::fs", "tracing",
        ] {
            assert!(!text.contains(word), "{} contains {word:?}", path.display());
        }
    }
    for (path, text) in sources(&source().join("zitadel")) {
        assert!(!text.contains("kube::"), "{} uses kube", path.display());
    }
}

/// One file writes token Secrets, status and Events. Another file writes the Lease and nothing else.
#[test]
fn one_file_writes_to_kubernetes_and_one_writes_the_lease() {
    let writes = [
        ".patch(",
        ".patch_status(",
        ".replace(",
        ".replace_status(",
        ".create(",
        ".delete(",
        ".delete_collection(",
        ".publish(",
    ];
    for module in ["controller", "ops", "cli"] {
        for (path, text) in sources(&source().join(module)) {
            if path.ends_with("controller/write.rs") {
                continue;
            }
            let text = if path.ends_with("ops/election.rs") {
                assert_eq!(text.matches("Api<").count(), 1, "{} writes more", path.display());
                assert!(text.contains("leases: Api<Lease>"), "{} writes more", path.display());
                text.replace("self.leases.replace(", "")
                    .replace("self.leases.create(", "")
            } else {
                text
            };
            for call in writes {
                assert!(!text.contains(call), "{} calls {call}", path.display());
            }
        }
    }
}

/// Each row of docs/faults.md names existing tests and reasons.
#[test]
fn every_documented_fault_names_an_existing_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let code: String = [sources(&root.join("tests")), sources(&source())]
        .concat()
        .into_iter()
        .map(|(_, text)| text)
        .collect();
    let page = std::fs::read_to_string(root.join("docs/faults.md")).expect("readable");
    let reasons: Vec<_> = zitadel_tokens::domain::reason::Reason::ALL
        .iter()
        .map(|r| r.name())
        .collect();
    let quoted = |cell: &str| -> Vec<String> { cell.split('`').skip(1).step_by(2).map(str::to_owned).collect() };
    let rows = page
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| fault "));
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split('|').collect();
        assert_eq!(cells.len(), 6, "{row}");
        let tests = quoted(cells[5]);
        assert!(!tests.is_empty(), "no test is named in: {row}");
        for test in tests {
            assert!(code.contains(&format!("fn {test}(")), "there is no test {test}");
        }
        for reason in quoted(cells[1]) {
            let named =
                reason.chars().all(char::is_alphabetic) && reason.chars().filter(|c| c.is_uppercase()).count() > 1;
            assert!(!named || reasons.contains(&&*reason), "there is no reason {reason}");
        }
    }
}

/// Markdown without code blocks.
fn prose(markdown: &str) -> String {
    markdown.split("```").step_by(2).collect()
}

/// The anchor that GitHub gives a heading.
fn anchor(heading: &str) -> String {
    let heading = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// Whether a file exists and, if it is Markdown and `fragment` is not empty, has a heading with this anchor.
fn resolves(path: &Path, fragment: &str) -> bool {
    if fragment.is_empty() || !has_extension(path, "md") {
        return path.exists();
    }
    let text = std::fs::read_to_string(path).unwrap_or_default();
    prose(&text)
        .lines()
        .any(|line| line.starts_with('#') && anchor(line) == fragment)
}

/// Citations of documents outside the repository. A section number is allowed only after `RFC nnnn`.
fn foreign_citations(text: &str) -> Vec<String> {
    let named = FOREIGN_DOCUMENTS.iter().filter(|document| text.contains(**document));
    let mut all: Vec<String> = named.map(|document| (*document).to_owned()).collect();
    for (at, sign) in text.match_indices('§') {
        // The section may be on the line after the RFC, in the same comment.
        let before = text[..at].trim_end_matches([' ', '\n', '/', '#']);
        let name = before.trim_end_matches(|c: char| c.is_ascii_digit());
        let is_rfc = name.ends_with("RFC ") && before.len() == name.len() + 4;
        let is_number = text[at + sign.len()..].starts_with(|c: char| c.is_ascii_digit());
        if is_number && !is_rfc {
            let line = 1 + text[..at].matches('\n').count();
            all.push(format!("a section in line {line}"));
        }
    }
    all
}

/// Paths such as `docs/faults.md` or `docs/faults.md#clocks` in a text that is not Markdown. URLs and longer paths
/// are skipped.
fn cited_pages(text: &str) -> Vec<(String, String)> {
    let in_path = |c: char| c.is_ascii_alphanumeric() || "-_./#".contains(c);
    let mut all = Vec::new();
    for (at, _) in text.match_indices("docs/") {
        if text[..at].ends_with(in_path) {
            continue;
        }
        let cited = text[at..].split(|c: char| !in_path(c)).next().unwrap_or_default();
        if let Some((page, fragment)) = cited.split_once(".md") {
            let fragment = fragment.strip_prefix('#').unwrap_or_default();
            all.push((format!("{page}.md"), fragment.trim_end_matches('.').to_owned()));
        }
    }
    all
}

/// Relative links of a Markdown page: path and fragment.
fn relative_links(markdown: &str) -> Vec<(String, String)> {
    let without_code: String = prose(markdown).split('`').step_by(2).collect();
    let targets = without_code.split("](").skip(1);
    let targets = targets.filter_map(|rest| rest.split([')', ' ']).next());
    targets
        .filter(|target| !target.contains("://"))
        .map(|target| target.split_once('#').unwrap_or((target, "")))
        .map(|(path, fragment)| (path.to_owned(), fragment.to_owned()))
        .collect()
}

/// Paths of source files that a text cites, such as `src/domain/plan.rs` or `domain/plan.rs`.
fn cited_sources(text: &str) -> impl Iterator<Item = &str> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || "-_./".contains(c)));
    let words = words.map(|word| word.trim_matches('.'));
    words.filter(|word| {
        word.contains('/')
            && !word.starts_with('/')
            && (has_extension(Path::new(word), "rs") || has_extension(Path::new(word), "go"))
    })
}

/// Text cites only documents of the repository and RFCs, and each path and link resolves.
#[test]
fn references_lead_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = [
        "src",
        "tests",
        "fuzz/fuzz_targets",
        "xtask",
        "benches",
        "charts",
        "docs",
        "examples",
    ];
    let mut paths: Vec<PathBuf> = folders.iter().flat_map(|folder| files(&root.join(folder))).collect();
    paths.extend(
        entries(&root.join("fuzz"))
            .into_iter()
            .filter(|p| has_extension(p, "rs")),
    );
    paths.extend(entries(root).into_iter().filter(|p| has_extension(p, "md")));
    paths.extend(["Makefile", "Cargo.toml", "deny.toml"].map(|name| root.join(name)));

    let sources: Vec<PathBuf> = paths.clone();
    let exists = |cited: &str| sources.iter().any(|path| path.ends_with(cited));
    let mut wrong = Vec::new();
    for path in paths {
        // A file that is not UTF-8 cites nothing.
        let Ok(text) = std::fs::read_to_string(&path) else {
            continue;
        };
        let this = path.strip_prefix(root).expect("below the root").display();
        // This file contains the patterns.
        if !path.ends_with(file!()) {
            for citation in foreign_citations(&text) {
                wrong.push(format!("{this} cites a document outside the repository: {citation}"));
            }
        }
        // Paths in URLs are those of other repositories.
        let local = text.split_whitespace().filter(|word| !word.contains("://"));
        for cited in local.flat_map(cited_sources).filter(|cited| !exists(cited)) {
            wrong.push(format!("{this} cites {cited}, which does not exist"));
        }
        let (base, references) = if has_extension(&path, "md") {
            (path.parent().expect("a folder"), relative_links(&text))
        } else {
            (root, cited_pages(&text))
        };
        for (target, fragment) in references {
            let file = if target.is_empty() {
                path.clone()
            } else {
                base.join(&target)
            };
            if !resolves(&file, &fragment) {
                wrong.push(format!("{this} refers to {target}#{fragment}, which does not exist"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
