"""Sphinx configuration of the site: `make docs` runs pages.py and then Sphinx, which writes docs/_build/html.

The build executes no notebooks, and the pages load no external files.
"""

import ast
import gc
import inspect
import io
import logging
import re
import sys
import tokenize
import tomllib
from collections import defaultdict
from dataclasses import is_dataclass
from functools import cache, cached_property, partial
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.addnodes import pending_xref
from sphinx.environment.adapters.toctree import global_toctree_for_doc
from sphinx.search.en import SearchEnglish
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

from modelfactory import PUBLIC_NAMES, __version__

gc.set_threshold(100_000, 20, 20)  # a build makes millions of nodes and frees few of them
logging.disable(logging.DEBUG)
sys.modules["rfc3987_syntax"] = None  # jsonschema would spend seconds on a grammar that no notebook needs

ROOT = Path(__file__).resolve().parents[1]
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})

project = "modelfactory"
version = release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx_copybutton", "sphinx_design"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb", ".rst": "restructuredtext"}
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_code_prompt_show = nb_code_prompt_hide = "source"
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "dollarmath", "substitution"]
myst_substitutions = dict(release=release)
smartquotes = False
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!modelfactory\.).*|.*\._\w+")]  # other libraries, builtins, private names
autosummary_generate = False
autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # `parameters` adds the types as they are written
add_module_names = False
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 100
modindex_common_prefix = ["modelfactory."]
html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"modelfactory {release}"
html_copy_source = html_show_sphinx = html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = dict(
    navigation_with_keys=True,
    footer_icons=[{"name": name, "url": url, "html": name, "class": ""} for name, url in URLS.items()],
)


class Search(SearchEnglish):
    "Finds the stem of each word once, not once per occurrence."

    stem = cache(SearchEnglish.stem)


def setup(app):
    app.add_search_language(Search)
    app.add_directive("constants", Constants)
    app.add_html_math_renderer("mathml", formula("inline"), formula("block"))
    app.connect("autodoc-skip-member", skip_undocumented)
    app.connect("autodoc-process-docstring", document)
    app.connect("doctree-read", look_up_exact_names)
    app.connect("env-updated", add_public_names)
    app.connect("missing-reference", resolve_by_name)
    app.connect("html-page-context", share_sidebar, priority=400)  # before the theme reads the tree
    app.connect("html-page-context", mark_current, priority=600)


def formula(display):
    "Renders a formula as MathML, which browsers display without loading MathJax."

    def visit(self, node):
        self.body.append(f"<span class='formula {display}'>{convert(node.astext(), display=display)}</span>")
        raise SkipNode

    return visit, None


# API: docstrings are markdown, and comments document parameters, fields and constants.


def skip_undocumented(app, what, name, obj, skip, options):
    "Leaves out attributes and undocumented methods of classes; the signature lists fields."
    is_documented = (inspect.isroutine(obj) or isinstance(obj, (property, cached_property))) and inspect.getdoc(obj)
    return True if what == "class" and not is_documented else None


def document(app, what, name, obj, options, lines):
    "Turns a docstring into reStructuredText, and adds what annotations and comments say about parameters."
    lines[:] = map(restructured, lines)
    if what == "module":
        notebook = re.search(r"File to edit: (?:\.\./)+(\S+)\.ipynb", inspect.getsource(obj))[1]
        lines += ["", f"Source, examples and tests: :doc:`{notebook}.ipynb </{notebook}>`", ""]
    elif what in ("class", "exception", "function", "method"):
        lines += ["", *parameters(obj), ""]


def restructured(line):
    "A line of markdown as reStructuredText: code in backticks becomes a reference if it is a name."
    return "".join(code(part) if part.startswith("`") else escaped(part) for part in re.split(r"(`[^`]+`)", line))


def code(span):
    text = span.strip("`")
    return f"\\ :py:obj:`{text}`\\ " if re.fullmatch(r"[A-Za-z_][\w.]*", text) else f"\\ ``{text}``\\ "


def escaped(text):
    return re.sub(r"([*|\\]|_\b)", r"\\\1", text)


def parameters(obj):
    "Fields with the types and the comments of parameters and of the returned value."
    function = inspect.unwrap(obj.__init__ if inspect.isclass(obj) else obj)
    if not inspect.isfunction(function):
        return
    comments = field_comments(obj) if is_dataclass(obj) else argument_comments(function)
    signature = inspect.signature(obj)
    for name, parameter in signature.parameters.items():
        yield f":param {name}: {comment_text(comments.get(name))}"
        if parameter.annotation is not parameter.empty:
            yield f":type {name}: {annotation_text(parameter.annotation)}"
    if comments.get("return"):
        yield f":returns: {comment_text(comments['return'])}"
    if signature.return_annotation not in (signature.empty, None, "None"):
        yield f":rtype: {annotation_text(signature.return_annotation)}"


def comment_text(comment):
    return restructured(" ".join((comment or "").split()))


def annotation_text(annotation):
    return escaped(annotation if isinstance(annotation, str) else inspect.formatannotation(annotation))


@cache
def source(module):
    "The text of a module, its syntax tree, and the comment of each line that has one."
    text = inspect.getsource(sys.modules[module])
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return text, ast.parse(text).body, {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def definition(obj):
    "The syntax tree of a function or class; None if the source of a module does not define it at its place."
    node, body = None, source(obj.__module__)[1]
    for name in obj.__qualname__.split("."):
        node = next((n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name), None)
        body = node.body if node else []
    return node


def argument_comments(function):
    "The comment beside each argument and beside the returned value of a function of the package."
    if not function.__module__.startswith("modelfactory.") or not (node := definition(function)):
        return {}
    comments, a = source(function.__module__)[2], node.args
    arguments = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
    texts = {arg.arg: comments.get(arg.lineno) for arg in arguments if arg and arg.lineno > node.lineno}
    return texts | {"return": comments.get(node.returns.end_lineno) if node.returns else None}


def field_comments(cls):
    "The comment of each field of a dataclass, including fields of base classes."
    texts = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("modelfactory."):
            comments = source(base.__module__)[2]
            fields = [line for line in definition(base).body if isinstance(line, ast.AnnAssign)]
            texts |= {f.target.id: " ".join(comments.get(n, "") for n in lines_of(f)) for f in fields}
    return texts


def lines_of(node):
    return range(node.lineno, node.end_lineno + 1)


class Constants(SphinxDirective):
    "Documents the constants of a module, which automodule leaves out: their comments, and values that fit into a line."

    required_arguments = 1

    def run(self):
        [module] = self.arguments
        exported = set(sys.modules[module].__all__)
        text, tree, comments = source(module)
        lines = [f".. py:currentmodule:: {module}", ""]
        for node in tree:
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                value = ast.get_source_segment(text, node.value)
                shown = [f"   :value: {value}"] if "\n" not in value and len(value) <= 80 else []
                names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
                for name in sorted(exported.intersection(names), key=names.index):
                    lines += [
                        f".. py:data:: {name}",
                        *shown,
                        "",
                        f"   {comment_text(comments.get(node.end_lineno))}",
                        "",
                    ]
        return self.parse_text_to_nodes("\n".join(lines))


def look_up_exact_names(app, doctree):
    "Spares a scan of all names for each type of a parameter; `resolve_by_name` finds names without a module."
    for node in doctree.findall(pending_xref):
        node.attributes.pop("refspecific", None)


def add_public_names(app, env):
    "Lists the names that `modelfactory` itself gives under these names as well, also in objects.inv and in the search."
    objects = env.domains.python_domain.objects
    for name, module in PUBLIC_NAMES.items():
        full, public = f"modelfactory.{module}.{name}", f"modelfactory.{name}"
        for key in [key for key in objects if f"{key}.".startswith(f"{full}.")]:
            objects[public + key.removeprefix(full)] = objects[key]
            objects[key] = objects[key]._replace(aliased=True)
    app.by_name = defaultdict(set)
    for key, entry in objects.items():
        if entry.objtype != "module":
            module = entry.docname.removeprefix("api/")
            app.by_name[key.removeprefix(f"{module}.")].add(entry)


def resolve_by_name(app, env, node, content):
    "Resolves a name without its module, as annotations and docstrings use it, if only one module has this name."
    entries = app.by_name.get(node["reftarget"], ()) if node.get("refdomain") == "py" else ()
    if len(entries) == 1:
        [entry] = entries
        return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content)


# Sidebar: Sphinx and the theme would make the tree of all pages for each page anew: half the time of a build.


def share_sidebar(app, pagename, templatename, context, doctree):
    "Gives the theme a tree that is made once; only the way to the root differs between folders."
    context["toctree"] = lambda **options: sidebar_tree(app.builder).replace('href="', f'href="{way_to_root(pagename)}')


@cache
def sidebar_tree(builder):
    options = dict(tags=builder.tags, collapse=False, includehidden=True, titles_only=True, maxdepth=-1)
    return builder.render_partial(global_toctree_for_doc(builder.env, "-", builder, **options))["fragment"]


def way_to_root(pagename):
    return "../" * pagename.count("/")


def mark_current(app, pagename, templatename, context, doctree):
    "Marks the page in the tree, and opens the sections that contain it."
    tree, page, relations = context["furo_navigation_tree"], pagename, app.builder.relations
    while page and page != app.config.root_doc:
        link = re.escape(way_to_root(pagename) + app.builder.get_target_uri(page))
        item = rf'<li class="(toctree-l\d[^"]*)">(<a class=")(reference internal" href="{link}">.*?</a>)(<input )?'
        tree = re.sub(item, partial(opened, is_page=page == pagename), tree, count=1)
        page = relations[page][0] if page in relations else "notebooks" if page.startswith("nbs/") else None
    context["furo_navigation_tree"] = tree


def opened(item, is_page):
    on_item, on_link = (" current-page", "current ") if is_page else ("", "")
    checkbox = f'{item[4]}checked="" ' if item[4] else ""
    return f'<li class="{item[1]} current{on_item}">{item[2]}{on_link}{item[3]}{checkbox}'
