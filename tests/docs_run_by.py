"""Which test runs which code block of the documentation.

Of each page the blocks that neither Sphinx nor a rule of ``test_docs_blocks`` runs: how the block
begins, and the test. An empty beginning stands for all files and commands of the page.
"""

# ruff: noqa: E501  # a row is a row

from __future__ import annotations

RUN_BY = {
    "README.md": {
        "from flask import Flask": "test_docs::test_the_app_of_the_readme_publishes_to_every_subscriber",
        "$ curl": "test_docs::test_the_app_of_the_readme_publishes_to_every_subscriber",
        "Hello!": "test_docs::test_the_page_of_the_readme_prints_what_the_readme_says",
        "from flask_eventstream import EventStreamResponse": "test_docs::test_the_generator_of_the_readme_streams_its_items",
    },
    "browser.rst": {
        "import { EventStream }": "test_eventstream_js::test_the_first_page_of_the_docs_shows_what_is_published_and_what_goes_wrong",
        "stream.onerror": "test_eventstream_js::test_the_first_page_of_the_docs_shows_what_is_published_and_what_goes_wrong",
        'const stream = new EventStream("/stream?channel=news", {': "test_eventstream_js::test_the_page_of_the_docs_with_a_token_reads_by_it",
        "function ask": "test_eventstream_js::test_the_page_of_the_docs_writes_what_the_model_says",
        'const stream = new EventStream("/stream?channel=news", { shared': "test_eventstream_js::test_the_pages_of_the_docs_share_a_connection_and_their_list",
    },
    "channels.rst": {
        "let cursor": "test_docs::test_the_page_with_a_token_goes_on_with_a_new_one_where_it_was",
        "source.addEventListener": "test_docs_blocks::test_a_page_takes_a_reset_for_a_new_beginning",
    },
    "clients.rst": {
        "recipes/": "test_client_recipes::test_every_file_of_the_recipes_is_shown",
        "recipes/recipes.py": "test_client_recipes::test_a_client_returns_with_its_cursor_and_shows_each_event_once",
        "recipes/follow_with_httpx.py": "test_client_recipes::test_httpx_sse_comes_back_with_its_cursor_after_a_502_too",
        "recipes/read_with_sseclient.py": "test_client_recipes::test_sseclient_reads_from_its_cursor",
        "../tests/clients/eventsource.mjs": "test_client_recipes::test_eventsource_of_npm_sends_a_header_and_stops_at_the_end",
        "../tests/clients/ai-sdk.mjs": "test_client_recipes::test_the_ai_sdk_reads_a_run_and_resumes_it",
        "curl -N": "test_client_recipes::test_curl_shows_the_stream_as_the_documentation_says",
        "data: one": "test_client_recipes::test_curl_shows_the_stream_as_the_documentation_says",
    },
    "cli.rst": {
        "$ flask eventstream publish": "test_docs_blocks::test_the_commands_print_what_the_page_shows",
        "$ flask eventstream listen": "test_docs_blocks::test_listen_prints_what_the_page_shows",
        "$ flask eventstream channels": "test_docs_blocks::test_the_commands_print_what_the_page_shows",
        "$ flask eventstream doctor": "test_docs_blocks::test_the_doctor_finds_what_the_page_shows",
    },
    "faq.rst": {
        "$ curl": "test_docs_blocks::test_curl_shows_events_as_they_come",
        "source.addEventListener": "test_docs_blocks::test_a_page_takes_events_by_their_type",
    },
    "flask-sse.rst": {
        "ACL SETUSER": "test_flask_sse_bridge::test_the_rights_in_the_documentation_are_enough",
    },
    "generator-streams.rst": {
        'const source = new EventSource("/numbers");': "test_docs_blocks::test_a_page_closes_a_stream_at_its_end",
        'const source = new EventSource("/stream/import");': "test_docs_blocks::test_a_page_shows_items_and_is_told_of_an_error",
        "import { readEvents }": "test_docs_blocks::test_a_page_reads_the_answer_to_a_post",
        "../example_app/static/js/read-events.js": "test_docs_blocks::test_a_page_reads_the_answer_to_a_post",
        '@eventstream.stream("/chat")': "test_docs_blocks::test_the_connection_goes_back_to_the_pool_before_the_stream",
    },
    "metrics.rst": {
        "from prometheus_client import CONTENT": "test_docs_blocks::test_metrics_of_two_workers_are_read_from_one",
        "$ export PROMETHEUS": "test_docs_blocks::test_metrics_of_two_workers_are_read_from_one",
        "from prometheus_client import multiprocess": "test_docs_blocks::test_metrics_of_two_workers_are_read_from_one",
        "# more than a tenth": "test_docs_blocks::test_the_alerts_ask_for_families_that_there_are",
    },
    "operations.rst": {
        "from gevent import monkey": "test_docs::test_the_program_with_pywsgi_ends_its_streams_when_it_is_told_to_stop",
        "A stream has ended": "test_docs_blocks::test_the_log_line_of_the_page_is_one_of_the_app",
    },
    "presence.rst": {
        "const members": "test_docs::test_the_page_of_a_room_shows_who_is_there_and_a_reload_is_nothing",
    },
    "proxies.rst": {
        "proxies/": "test_proxies::test_the_first_bytes_and_each_event_arrive_at_once",
        "proxies/away.asis": "test_proxies::test_a_restart_is_survived_by_a_browser_and_without_its_lines_it_is_not",
    },
    "quickstart.rst": {
        "$ flask --app app run": "test_docs_blocks::test_the_quickstart_greets_two_tabs",
        "$ curl": "test_docs_blocks::test_the_quickstart_greets_two_tabs",
    },
    "redis.rst": {
        "app.config": "test_docs_blocks::test_the_programs_publish_to_the_app_with_its_setting",
        "from flask_eventstream.redis_broker": "test_docs_blocks::test_the_programs_publish_to_the_app_with_its_setting",
        "broker.publish_many": "test_docs_blocks::test_the_programs_publish_to_the_app_with_its_setting",
        "python -c": "test_docs::test_another_program_publishes_as_the_documentation_says",
        "maxmemory-policy": "test_docs_blocks::test_redis_starts_with_the_settings_of_the_page",
        "ACL SETUSER": "test_redis_broker::test_the_rights_in_the_documentation_are_enough",
    },
    "runs.rst": {
        "const url": "test_docs::test_the_page_of_a_run_shows_all_of_it_after_a_reload_too",
        "const controller": "test_docs_blocks::test_fetch_event_source_reads_a_run_and_stops_at_204",
    },
    "security.rst": {
        "const source": "test_security::test_a_page_of_an_allowed_origin_reads_a_stream_with_its_cookie",
        "import { readEvents }": "test_security::test_a_page_of_an_allowed_origin_reads_a_stream_with_a_token_in_a_header",
        "log_format": "test_docs_blocks::test_nginx_keeps_the_query_out_of_its_log",
    },
    "testing.rst": {
        "import pytest": "test_docs_blocks::test_the_test_of_the_page_passes",
    },
    "wire.rst": {
        "source.addEventListener": "test_docs_blocks::test_a_page_unzips_binary_data",
    },
    "tutorials/chat-room.rst": {
        "": "test_tutorials::test_two_talk_in_a_room_and_a_third_one_hears_what_was_said",
    },
    "tutorials/notifications.rst": {
        "": "test_tutorials::test_a_script_a_command_and_a_task_publish_to_two_workers",
        "const send": "test_tutorials::test_news_reach_everybody_and_messages_one",
    },
    "tutorials/typewriter.rst": {
        "": "test_tutorials::test_the_answer_survives_a_reload_and_is_in_a_second_tab",
        "import os": "test_tutorials::test_stop_ends_the_question_to_a_real_model",
        "import time": "test_tutorials::test_the_typewriter_writes_word_by_word_and_does_not_ask_again",
    },
}
